"""camera.py against the reference's numbers, and against plain geometry."""

import math

import golden
import pytest
import torch

import camera
import depth

DESCRIPTION, GOLDEN = golden.case("camera_conditioning")
SCENES, WORLD = golden.case("geometry")
WORLDS = sorted({key.split("/")[1] for key in WORLD if key.startswith("world/")})


def golden_scale(mode, variant, dtype):
    """The scale that the reference used in this golden case."""
    if "precomputed" in variant:
        value = 1e-3 if variant.endswith("small") else DESCRIPTION["precomputed_scale"]
        return torch.full((DESCRIPTION["batch_size"],), value, dtype=dtype)
    known = GOLDEN["in/depth_cond"][..., 0]
    if mode == "7dof_quantile_scale":
        blend = not variant.endswith("noblend")
        dense = depth.dense_depth(GOLDEN["in/depth_model_disparity"], known, blend)
        return camera.quantile_scale(dense)
    if mode == "7dof_metric_scale":
        return camera.metric_scale(GOLDEN["in/depth_model_metric"][:, 0], known)
    if mode == "7dof_stereomag_scale":
        return camera.stereomag_scale(GOLDEN["in/nearplane_quantile"].to(dtype))
    return GOLDEN["in/scene_radius"].to(dtype)


CASES = sorted({key.split("/")[1] for key in GOLDEN if key.startswith("f64/")})


@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("variant", CASES)
def test_pose_vector_equals_the_reference(variant, precision):
    dtype = torch.float64 if precision == "f64" else torch.float32
    mode = max((name for name in camera.MODES if variant.startswith(name)), key=len)
    T = camera.conditioning(mode, GOLDEN["in/cond_cam2world"].to(dtype),
                            GOLDEN["in/target_cam2world"].to(dtype),
                            torch.deg2rad(GOLDEN["in/fov_deg"].to(dtype)),
                            golden_scale(mode, variant, dtype))
    assert T.dtype == dtype and T.shape == (DESCRIPTION["batch_size"], camera.MODES[mode].width)
    uses_float32_depth = camera.MODES[mode].needs_depth and "precomputed" not in variant
    exact = precision == "f64" and not uses_float32_depth
    golden.assert_close(T, GOLDEN[f"{precision}/{variant}"], relative=1e-12 if exact else 1e-5)


def test_quantile_scales_equal_the_reference():
    for blend in ("blend", "noblend"):
        dense = depth.dense_depth(GOLDEN["in/depth_model_disparity"],
                                  GOLDEN["in/depth_cond"][..., 0], blend == "blend")
        scales = GOLDEN[f"quantile_scale_{blend}/scales"][:, 0]
        found = camera.quantile_scale(dense)
        # Row by row, so that a large scale does not hide an error in a small one.
        torch.testing.assert_close(found, scales, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_scene_geometry_equals_the_reference(world):
    expected = {key.rsplit("/", 1)[1]: value for key, value in WORLD.items()
                if key.startswith(f"world/{world}/")}
    bottom = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    bottom = bottom.expand(len(expected["in_world2cam"]), 1, 4)
    c2w = torch.linalg.inv(torch.cat([expected["in_world2cam"], bottom], dim=1))
    scene = camera.scene_geometry(c2w)
    golden.assert_close(c2w, expected["camtoworld"], relative=1e-12)
    golden.assert_close(scene.center, expected["center"], relative=1e-12)
    golden.assert_close(scene.focus_point, expected["focus_pt"], relative=1e-9)
    golden.assert_close(scene.radius, expected["scene_radius"], relative=1e-12)
    golden.assert_close(scene.radius_focus, expected["scene_radius_focus_pt"], relative=1e-9)
    golden.assert_close(scene.elevation, expected["elevation_deg"], relative=1e-9)


def test_co3d_cameras_equal_the_reference():
    for row in SCENES["co3d_load_sample_metadata"]:
        R, T = (torch.tensor(row["json"][key], dtype=torch.float64) for key in "RT")
        flipped = torch.tensor(row["camera_after_flips"], dtype=torch.float64)
        w2c = torch.linalg.inv(camera.opengl_from_pytorch3d(R, T))
        torch.testing.assert_close(w2c[:3], flipped, rtol=0, atol=1e-12)


def test_parallel_and_single_cameras_have_no_focus_point():
    parallel = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    parallel[:, 0, 3] = torch.arange(3)
    for c2w in (parallel, parallel[:1]):
        scene = camera.scene_geometry(c2w)
        assert scene.focus_point.isnan().all() and scene.radius.isfinite()


def test_opencv_and_opengl_are_one_flip_apart():
    c2w = GOLDEN["in/cond_cam2world"]
    flipped = camera.opengl_from_opencv(c2w)
    torch.testing.assert_close(flipped[:, :3, 2], -c2w[:, :3, 2])
    torch.testing.assert_close(flipped[:, :, 3], c2w[:, :, 3])
    torch.testing.assert_close(camera.opengl_from_opencv(flipped), c2w)


def test_look_at_puts_the_target_on_the_optical_axis():
    generator = torch.Generator().manual_seed(0)
    position, target = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    c2w = camera.look_at(position, target)
    seen = torch.linalg.solve(c2w, torch.cat([target, torch.ones(5, 1)], dim=1)[..., None])[..., 0]
    torch.testing.assert_close(seen[:, :2], torch.zeros(5, 2, dtype=torch.float64),
                               rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[:, 2], -(target - position).norm(dim=1))
    torch.testing.assert_close(torch.linalg.det(c2w), torch.ones(5, dtype=torch.float64))
    assert (c2w[:, 2, 1] > 0).all(), "the camera's up points down in the world"


def test_scaled_modes_do_not_see_the_unit_of_a_scene():
    cond, target = GOLDEN["in/cond_cam2world"][:8], GOLDEN["in/target_cam2world"][:8]
    fov = torch.ones(8)
    scale = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    unit = torch.tensor([1.0, 1, 1, 7], dtype=torch.float64) * torch.ones(4, 1)
    unit[3] = 1
    for mode in (name for name, mode in camera.MODES.items() if not mode.unscaled):
        torch.testing.assert_close(
            camera.conditioning(mode, cond, target, fov, scale),
            camera.conditioning(mode, cond * unit, target * unit, fov, 7 * scale))


def test_the_published_name_7dof_qs_is_the_quantile_mode():
    cond, target, fov = GOLDEN["in/cond_cam2world"], GOLDEN["in/target_cam2world"], torch.ones(18)
    assert torch.equal(
        camera.conditioning("7dof_qs", cond, target, fov, torch.ones(18)),
        camera.conditioning("7dof_quantile_scale", cond, target, fov, torch.ones(18)))


def test_an_unknown_mode_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="8dof.*7dof_quantile_scale"):
        camera.conditioning("8dof", torch.eye(4)[None], torch.eye(4)[None],
                            torch.ones(1), torch.ones(1))
    assert math.isclose(camera.quantile_scale(torch.ones(1, 8, 8)).item(), 1.0)
