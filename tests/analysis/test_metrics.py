"""metrics.py: equal to scikit-image, LPIPS by the given weights; warps land where synth renders them;
the epipolar figure tells a view that follows its camera from those that do not."""

import sys
import types

import golden
import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import camera
from analysis import metrics
from captures import synth

SIZE = 48


# ---- against independent implementations

def images(name, shape=(3, 3, 40, 40)):
    """Two alike images (b, c, h, w) in [-1, 1] that belong to a name."""
    x = golden.network_input(f"metrics/{name}", shape, tanh=True)
    return x, (x + 0.3 * golden.network_input(f"metrics/{name}/other", shape)).clamp(-1, 1)


def test_ssim_and_psnr_equal_scikit_image():
    oracle = pytest.importorskip("skimage.metrics")
    smooth = torch.nn.functional.interpolate(images("small", (3, 3, 8, 8))[0], (40, 40),
                                             mode="bicubic").clamp(-1, 1)
    for x, y in (images("noise"), (smooth, images("noise")[0]), (smooth, 0.9 * smooth)):
        a, b = ((v.double().numpy() + 1) / 2 for v in (x, y))       # the reference's are in [0, 1]
        ssim = [oracle.structural_similarity(p, q, data_range=1.0, channel_axis=0)
                for p, q in zip(a, b)]
        psnr = [oracle.peak_signal_noise_ratio(p, q, data_range=1.0) for p, q in zip(a, b)]
        golden.assert_close(metrics.ssim(x, y), np.array(ssim), relative=1e-6)
        golden.assert_close(metrics.psnr(x, y), np.array(psnr), relative=1e-6)


def test_sharpness_falls_with_contrast_and_with_blur():
    x, _ = images("sharp")
    assert_close(metrics.sharpness(x, x), torch.ones(3))
    assert_close(metrics.sharpness(0.5 * x + 0.1, x), torch.full((3,), 0.25))
    assert (metrics.sharpness(torch.nn.functional.avg_pool2d(x, 3, 1, 1), x) < 0.5).all()


def test_ssim_of_an_image_with_itself_is_one_and_tiny_images_are_refused():
    x, _ = images("same")
    assert torch.equal(metrics.ssim(x, x), torch.ones(3))
    with pytest.raises(ValueError, match="at least 7 pixels a side, not 6"):
        metrics.ssim(x[..., :6, :6], x[..., :6, :6])


def torchvisions(net):
    """torchvision's features of AlexNet or VGG-16, written out; golden weights."""
    if net == "alex":
        layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
                  nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
                  nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
                  nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
                  nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]
    else:
        layers, c = [], 3
        for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            layers.append(nn.MaxPool2d(2, 2))
    whole = nn.Module()
    whole.features = nn.Sequential(*layers)
    return golden.fill(whole, f"{net}.")


def backbone_file(net, folder):
    """torchvision's file of a backbone, with a classifier that nothing asks for."""
    path = folder / f"{net}.pth"
    torch.save(torchvisions(net).state_dict() | {"classifier.1.weight": torch.zeros(4, 4)}, path)
    return path


@pytest.fixture
def package(monkeypatch):
    """The lpips package, on a torchvision that knows two networks and nothing else."""
    models = types.ModuleType("torchvision.models")
    models.alexnet, models.vgg16 = ((lambda pretrained, net=net: torchvisions(net))
                                    for net in ("alex", "vgg"))
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    try:
        import lpips
    except (ImportError, RuntimeError) as err:
        pytest.skip(f"lpips cannot be imported here: {err}")
    yield lpips
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "lpips":
            del sys.modules[name]


def by_hand(net, package, x, y):
    """LPIPS as its paper has it (eq. 1), by torchvision's layers and the package's linear weights."""
    taps = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[net]
    linear = torch.load(package.__path__[0] + f"/weights/v0.1/{net}.pth", weights_only=True,
                        map_location="cpu")
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-.030, -.088, -.188),
                                                             (.458, .448, .450)))
    x, y, total = (x - shift) / scale, (y - shift) / scale, 0
    for i, layer in enumerate(torchvisions(net).features[:taps[-1] + 1]):
        x, y = layer(x), layer(y)
        if i in taps:
            a, b = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y))
            weight = linear[f"lin{taps.index(i)}.model.1.weight"]
            total = total + ((a - b).square() * weight[0]).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("net, size", [("alex", 40), ("vgg", 40)])
def test_lpips_is_by_the_given_backbone_and_the_packages_linear_weights(package, tmp_path, net, size):
    x, y = images(f"lpips{size}", (2, 3, size, size))
    with torch.no_grad():
        expected = by_hand(net, package, x, y)
        found = metrics.load_lpips(net, backbone_file(net, tmp_path))(x, y)
    golden.assert_close(found, expected, relative=1e-5)
    assert expected.min() > 1e-3


def test_lpips_weights_that_do_not_fit_are_refused_in_one_line(package, tmp_path):
    alex = backbone_file("alex", tmp_path)
    for arguments, message in ((("vgg", alex), "not torchvision's vgg16: features.0.weight"),
                               (("squeeze", alex), "it is one of alex, vgg")):
        with pytest.raises(ValueError, match=message) as error:
            metrics.load_lpips(*arguments)
        assert "\n" not in str(error.value)
    small = torch.zeros(1, 3, 30, 30)
    with pytest.raises(ValueError, match="at least 31 pixels a side, not 30"):
        metrics.load_lpips("alex", alex)(small, small)


def test_without_the_lpips_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        metrics.load_lpips("alex", "none.pth")


# ---- the warp

@pytest.fixture(scope="module")
def pairs():
    """Two views of 48 scenes: images, depths, scenes, cameras, relative pose, field of view."""
    found = types.SimpleNamespace(scenes=[synth.scene(3, k) for k in range(48)])
    c2w = torch.stack([synth.cameras(scene, 8) for scene in found.scenes])
    first = torch.arange(48) % 8
    rows = torch.arange(48)
    found.cond_c2w, found.target_c2w = c2w[rows, first], c2w[rows, (first + 3) % 8]
    found.fov = torch.tensor([scene.fov for scene in found.scenes])
    found.cond, found.depth_cond = rendered(found, found.cond_c2w)
    found.truth, found.depth_target = rendered(found, found.target_c2w)
    found.pose = camera.relative_pose(found.cond_c2w, found.target_c2w)
    return found


def rendered(pairs, c2w):
    views = [synth.render(scene, pose[None], scene.fov, SIZE) for scene, pose in zip(pairs.scenes, c2w)]
    return [torch.cat(each) for each in zip(*views)]


def test_the_warp_shows_what_a_rendering_from_there_shows(pairs):
    colours, seen = metrics.warp(pairs.cond, pairs.depth_cond, pairs.pose, pairs.fov,
                                 pairs.depth_target)
    figure = metrics.agreement(pairs.truth, colours, seen)
    assert seen.float().mean() > 0.5            # most of the view
    assert figure.nanmean() > 29                # bilinear samples of textures
    assert (figure > metrics.agreement(pairs.cond, colours, seen))[~figure.isnan()].all()


def test_without_motion_the_warp_is_the_view_itself(pairs):
    still = torch.eye(4).expand(48, 4, 4)
    colours, seen = metrics.warp(pairs.cond, pairs.depth_cond, still, pairs.fov, pairs.depth_cond)
    inner = (slice(None), slice(1, -1), slice(1, -1))       # rounding decides about the edge
    # where inverse depths of two surfaces differ between pixels the sample is still at a centre
    assert seen[inner].float().mean() > 0.99
    assert_close(colours.mT.mT[seen[:, None].expand_as(colours)],
                 pairs.cond[seen[:, None].expand_as(colours)], atol=1e-3, rtol=0)


def wall_and_motion(size=32):
    """A wall at depth 4, seen by a camera that moves 0.5 to the right, with a field of view of 90
    degrees: at depth z a pixel is 2 z / size wide."""
    fov = torch.tensor([np.pi / 2])
    pose = torch.eye(4)[None].clone()
    pose[:, 0, 3] = 0.5
    return fov, pose, torch.full((1, size, size), 4.0)


def test_a_nearer_surface_wins_and_what_it_uncovers_stays_empty():
    fov, pose, wall = wall_and_motion()
    depth = wall.clone()
    depth[:, :, 16:20] = 2.0
    found = metrics.splat(depth, pose, fov)[0]
    # the wall moves 0.5 / (2 * 4 / 32) = 2 pixels to the left, the card 4: to 12 .. 15
    assert (found[:, 12:16] == 2).all()
    assert (found[:, :12] == 4).all() and (found[:, 18:30] == 4).all()
    assert (found[:, 16:18] == 0).all()                     # what the card hid before
    assert (found[:, 30:] == 0).all()                       # beyond the edge of the first view


def test_surfaces_that_the_target_view_hides_are_not_seen_by_both():
    fov, pose, wall = wall_and_motion()
    hidden = wall.clone()
    hidden[:, 8:12, 8:12] = 1.5             # a card that the conditioning view does not know
    seen = metrics.warp(torch.zeros(1, 3, 32, 32), wall, pose, fov, hidden)[1][0]
    assert not seen[8:12, 8:12].any() and seen[:8, :28].all() and seen[12:, :28].all()


def test_unknown_depth_is_not_seen():
    fov, pose, wall = wall_and_motion()
    holes = wall.clone()
    holes[:, 10:14, 10:14] = 0
    colours, seen = metrics.warp(torch.zeros(1, 3, 32, 32), holes, pose, fov, 0 * wall)
    assert not seen[0, 10:14, 8:12].any() and seen[0, 2:8, 2:28].all()
    assert not metrics.warp(torch.zeros(1, 3, 32, 32), 0 * wall, pose, fov, 0 * wall)[1].any()
    figure = metrics.agreement(colours, colours, torch.zeros(1, 32, 32, dtype=torch.bool))
    assert figure.isnan().all()


# ---- the epipolar figure

def follow(pairs, relative):
    """What a perfect model shows, blurred, that takes `relative` for the target's pose."""
    views = rendered(pairs, pairs.cond_c2w @ relative)[0]
    blurred = torch.nn.functional.avg_pool2d(views, 3, 1, 1, count_include_pad=False)
    return blurred + 0.05 * golden.network_input("followed", blurred.shape)


def scaled(pose, factor):
    pose = pose.clone()
    pose[:, :3, 3] *= factor[:, None]
    return pose


def error_of(values):
    return values.std() / len(values)**0.5


def test_the_figure_tells_apart_what_does_not_follow_its_camera(pairs):
    followed = metrics.Followed(pairs.cond, pairs.depth_cond, pairs.depth_target, pairs.pose,
                                pairs.fov)
    unit = torch.tensor([scene.unit for scene in pairs.scenes])
    right = followed(follow(pairs, pairs.pose))
    broken = {
        "negated": follow(pairs, torch.linalg.inv(pairs.pose)),
        # the scene's own unit is taken for the model's: motions too long or too short
        "scale ignored": follow(pairs, scaled(pairs.pose, unit)),
        "still": pairs.cond,
        "shuffled": follow(pairs, pairs.pose).roll(1, 0),
    }
    assert right["camera_found"].nanmean() > 0.95
    for name, views in broken.items():
        found = followed(views)
        for figure in ("reprojection", "camera_margin", "camera_found"):
            lead = right[figure] - found[figure]
            lead = lead[~lead.isnan()]
            assert len(lead) > 40 and lead.mean() > 5 * error_of(lead), (name, figure)


def test_a_view_that_knows_nothing_of_the_camera_does_not_find_it(pairs):
    followed = metrics.Followed(pairs.cond, pairs.depth_cond, pairs.depth_target, pairs.pose,
                                pairs.fov)
    mean = pairs.cond.mean(dim=(2, 3), keepdim=True).expand_as(pairs.cond)
    assert followed(mean)["camera_found"].nanmean() < 0.4
    assert followed(pairs.cond)["camera_found"].nanmean() == 0
    # a copy agrees no better than rounding to 8 bits would let it, 59 dB
    assert followed(pairs.cond)["camera_margin"].nanmean() > -60


@pytest.mark.parametrize("name", ["still", "mirrored", "half as far", "twice as far"])
def test_a_view_that_follows_one_of_the_other_cameras_is_not_taken_for_right(pairs, name):
    followed = metrics.Followed(pairs.cond, pairs.depth_cond, pairs.depth_target, pairs.pose,
                                pairs.fov)
    wrong = followed(follow(pairs, metrics.other_cameras(pairs.pose)[name]))
    assert wrong["camera_found"].nanmean() < 0.2 and wrong["camera_margin"].nanmean() < -3


def test_psnr_is_of_each_image_and_not_of_the_batch():
    truth = torch.zeros(2, 3, 8, 8)
    near, far = truth[:1] + 0.1, truth[1:] + 0.9
    both = metrics.psnr(torch.cat([near, far]), truth)
    assert torch.equal(both[:1], metrics.psnr(near, truth[:1]))
    assert torch.equal(both[1:], metrics.psnr(far, truth[1:])) and both[0] > both[1] + 15
