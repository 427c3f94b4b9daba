"""view.py in a real browser: dragging, keys, films, photos that are none, and whom the server answers.

The page's model is the small random one of a run, or an oracle that draws the truth of the synthetic
scene, so that what a drag does can be compared with it. With PICTURES=docs the last test takes the
pictures of docs/, of weights/small.safetensors and the scenes of `prepare.py synth`.
"""

import base64
import functools
import http.client
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import camera
import configs
import golden
import model
import prepare
import sample
import view
from runtime import checkpoint
from views import cameras, paths, photos, pictures
from views.render import Render, Stopped, load, open_run, place
from views.server import Server
from views.studio import Studio, Subject, listed

ROOT = Path(__file__).parents[2]
SIZE = 16                   # pixels a side of the small run's images
SWITCHES = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
            "--disable-background-networking --disable-component-update").split()
WAIT = 60                   # seconds for what is there within one on an idle machine


class Oracle(Render):
    """Draws the truth, as a perfect model would."""
    def __call__(self, cameras, label="", watch=None):
        yield from map(pictures.image, self.truth(cameras.c2w, cameras.fov))


@pytest.fixture(scope="module", name="run")
def small_run(tmp_path_factory):
    """A folder like out/synth, of a small random network; its scenes lie beside it, in data/."""
    folder = tmp_path_factory.mktemp("page")
    prepare.main(["synth", "--out", str(folder / "data"), "--scenes", "2", "--held-out", "2", "--views", "3",
                  "--size", str(SIZE), "--workers", "1", "--device", "cpu"])
    sources = tuple(configs.Source(name, name, f"{name}/train-*.tar", 0.5, f"{name}/held-out-*.tar")
                    for name in ("co3d", "re10k"))
    config = configs.Config(
        sources=sources, data=str(folder / "data"), out=str(folder / "run"), latent="pixels",
        image_size=SIZE, model_channels=32, channel_mult=(1,), num_res_blocks=1, mode="7dof",
        attention_resolutions=(), num_heads=1, context_dim=8, sample_steps=3)
    net = golden.fill(model.build(config))
    average = {name: w for name, w in net.state_dict().items() if name.startswith(checkpoint.UNET)}
    checkpoint.save(config.out, 5, dict(net.state_dict()), average, {},
                    {"step": 5, "ema_updates": 1, "config": asdict(config)})
    return folder / "run"


@pytest.fixture(scope="module", name="studio")
def small_studio(run, tmp_path_factory):
    """A Studio of the small model and of an oracle, with the small run's scenes."""
    config = open_run(run, str(run.parent / "data"))[1]

    def load_model(path):
        kind = Oracle if path == "oracle" else Render
        render = kind(*load(run, "cpu", "fp32"))
        render.truth = view.held_out(config, 0, render).truth
        return render

    studio = Studio(load_model, [run, "oracle"], tmp_path_factory.mktemp("films"), ["--device", "cpu"],
                    ["arc/0", "walk/1"], lambda place, render: view.held_out(config, place, render))
    studio.start(view.held_out(config, 0, studio.render))
    return studio


@pytest.fixture(scope="module", name="server")
def running_server(studio):
    server = Server(studio, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module", name="browser")
def headless_browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chromium.set_script_timeout(WAIT)
    yield chromium
    chromium.quit()


class Page:
    """The page in a browser."""
    def __init__(self, browser, address, width=1280, height=900, dark=False):
        self.browser = browser
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        browser.get(address)
        self.at_rest()

    def js(self, code, *arguments):
        return self.browser.execute_script(f"return {code}", *arguments)

    def get(self, name):
        return self.browser.find_element("id", name)

    def until(self, condition):
        """Waits until an expression of the page is true."""
        end = time.monotonic() + WAIT
        while not self.js(condition):
            assert time.monotonic() < end, f"{condition} never came: {self.get('viewProblem').text}"
            time.sleep(0.05)

    def at_rest(self):
        """Waits until the view has all its steps."""
        self.until("state && state.photo && !dirty && !pumping && !refining && $('view').complete")

    def keys(self, *keys):
        self.get("stage").send_keys(*keys)

    def c2w(self):
        return torch.tensor(self.js("cam.c2w"), dtype=torch.float64)

    def pixels(self, name="view"):
        """What an image of the page shows, (s, s, 3)."""
        data = self.js("""((image, canvas) => {
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL(); })(document.getElementById(arguments[0]), document.createElement('canvas'))""",
                       name)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")).astype(int)

    def choose(self, name, text):
        from selenium.webdriver.support.ui import Select
        Select(self.get(name)).select_by_visible_text(text)


def ask(server, name, body=b"{}", method="POST", **headers):
    """(status, body) of a request, with the page's own headers but for those that are named."""
    own = {"Host": f"127.0.0.1:{server.server_port}", "X_Token": server.token,
           "X_Session": server.studio.session, **headers}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=WAIT)
    connection.putrequest(method, f"/{name}", skip_host=True)
    for header, value in {"Content_Length": str(len(body)), **own}.items():
        connection.putheader(header.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


# ---- whom the server answers

def test_only_the_page_with_its_token_from_this_host_is_answered(server):
    server.studio.open({})
    status, page = ask(server, f"?token={server.token}", method="GET")
    assert status == 200 and b"Walk into a photo" in page
    status, words = ask(server, "?token=wrong", method="GET")
    assert status == 403 and b"the address that view.py printed" in words
    assert ask(server, "progress")[0] == 400        # is answered: there is no film yet
    refused = {403: [{"Host": "evil.example:80"}, {"Origin": "http://evil.example"}, {"X_Token": "wrong"},
                     {"Origin": "null"}],
               410: [{"X_Session": "of another tab"}], 413: [{"Content_Length": str(2**40)}]}
    for wanted, cases in refused.items():
        for case in cases:
            status, words = ask(server, "progress", **case)
            assert status == wanted and json.loads(words)["error"], case
    assert ask(server, "progress", Host="evil.example")[0] == 403
    for name in ("start", "__init__", "../view.py", "subject"):
        assert ask(server, name)[0] == 404, name


@pytest.mark.parametrize("name, asked, said", [
    ("picture", {"file": "../../secret"}, "no such file"),
    ("view", {"c2w": [[1]], "fov": 1}, "no 3x4 or 4x4 matrix"),
    ("view", {"c2w": [[0, 0, 0, 0]] * 4, "fov": 9}, "fov is 9"),
    ("path", {"motion": "orbit", "by": "far"}, "by is far, not a number"),
    ("choose", {"model": "/etc/passwd"}, "a fault of the program"),
    ("choose", {"scene": 99}, "there are scenes 0 to 1"),
    ("view", 3, "a fault of the program"),
])
def test_what_makes_no_sense_is_answered_in_one_line(server, name, asked, said):
    server.studio.open({})
    status, words = ask(server, name, json.dumps(asked).encode())
    assert status == 400 and said in json.loads(words)["error"]


def test_the_newest_view_wins_and_none_queue_up(studio):
    begun, go_on, ends = threading.Event(), threading.Event(), []
    home = paths.around(0.0, studio.subject.photo.elevation, 1.0).tolist()
    asked = {"c2w": home, "fov": 1.0, "scale": 1.0, "sampler": "ddim", "guidance": 1, "eta": 0, "seed": 0}
    real = studio.render

    class Slow(Render):
        def __init__(self):
            self.__dict__.update(real.__dict__)

        def __call__(self, cameras, label):
            begun.set()
            go_on.wait(WAIT)
            if self.stopped:
                raise Stopped
            yield Image.new("RGB", (1, 1), (self.options["steps"], 0, 0))

    def request(steps):
        try:
            data, *_ = studio.view({**asked, "steps": steps})
            ends.append((steps, Image.open(io.BytesIO(data)).getpixel((0, 0))[0]))
        except Stopped:
            ends.append((steps, "replaced"))

    studio.render = Slow()
    try:
        threads = [threading.Thread(target=request, args=(steps,)) for steps in (1, 2, 3)]
        for thread in threads:
            thread.start()
            begun.wait(WAIT)
            time.sleep(0.05)
        go_on.set()
        for thread in threads:
            thread.join(WAIT)
    finally:
        studio.render = real
    assert sorted(ends) == [(1, "replaced"), (2, "replaced"), (3, 3)]


def test_a_3dof_model_goes_around_the_centre_alone(run, tmp_path):
    config = replace(load(run, "cpu", "fp32")[1], mode="3dof")
    studio = Studio(lambda path: Render(place(golden.fill(model.build(config)), "cpu", "fp32"), config), ["3dof"],
                    tmp_path)
    studio.start(Subject(photos.Photo(Image.new("RGB", (SIZE, SIZE)), SIZE, 1.0, 10.0, 1.0), "a photo"))
    assert list(studio.motions) == ["orbit", "swing", "spiral", "dolly", "grid"]
    for name, (by, _) in studio.motions.items():
        found = studio.path({"motion": name, "by": by})
        path = studio.path({**found, "views": 7})["keys"]
        assert len(studio.cameras(path)) == 7, name         # is not refused
    truck = paths.motion("truck", 2, 0.4, 1.0, 10.0)
    with pytest.raises(ValueError, match="3DoF model knows of azimuth, elevation and distance alone"):
        studio.cameras(listed(truck)["keys"])


# ---- in the browser

def test_keys_move_the_camera_as_the_paths_of_sample_do(server, browser):
    page, rise = Page(browser, server.address), server.studio.subject.photo.elevation
    shift, right, up = "\ue008", "\ue014", "\ue013"
    for keys, motion, by in (("d", "truck", 0.05), ("e", "pedestal", 0.05), ("w", "dolly", 0.05),
                             (shift + right + shift, "pan", 4), (shift + up + shift, "tilt", 4), ("+", "zoom", 1.05),
                             (right, "orbit", 4)):
        page.keys("h", keys)
        wanted = paths.motion(motion, 2, by, server.studio.subject.photo.fov, rise)
        torch.testing.assert_close(page.c2w(), wanted.c2w[1], rtol=0, atol=1e-9, msg=motion)
        assert page.js("cam.fov") == pytest.approx(wanted.fov[1].item())
    page.keys("h", up)
    torch.testing.assert_close(page.c2w(), paths.around(0, rise + 4, 1), rtol=0, atol=1e-9)


def test_a_drag_turns_the_view_as_the_scene_turns(server, browser):
    from selenium.webdriver import ActionChains
    studio = server.studio
    page = Page(browser, server.address)
    page.js("document.querySelector('#model').value = 1, $('model').onchange()")
    page.until("state.model === 1")
    page.at_rest()
    side = page.js("$('stage').clientWidth")
    ActionChains(browser).move_to_element(page.get("stage")).click_and_hold().move_by_offset(
        side // 5, 0).release().perform()
    page.at_rest()
    azimuth, photo = -70 * (side // 5) / side, studio.subject.photo
    # what was seen follows the pointer to the right: the camera goes to the left
    wanted, mirrored = (np.asarray(pictures.image(studio.subject.truth(
        paths.around(x, photo.elevation, 1.0)[None], [photo.fov])[0])).astype(int) for x in (azimuth, -azimuth))
    shown = page.pixels()
    assert abs(shown - wanted).mean() < 1 < 5 < abs(shown - mirrored).mean()
    # the truth is the renderer's, from the same camera
    assert np.array_equal(page.pixels("truth"), shown)
    assert page.js("$('view').dataset.steps") == "3" and "cpu" in page.get("cost").text


def test_a_click_on_a_real_camera_shows_its_photo_beside_the_view(server, browser):
    page, subject = Page(browser, server.address), server.studio.subject
    assert page.js("document.querySelectorAll('#above .real').length") == 2
    page.js("document.querySelectorAll('#above .real')[1].dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    page.until("$('truthName').textContent.includes('real photo from camera 1')")
    page.at_rest()
    assert np.array_equal(page.pixels("truth"), np.asarray(subject.real(1)))
    torch.testing.assert_close(page.c2w(), subject.c2w[1])


def test_key_frames_make_a_film_whose_command_makes_the_same_views(server, browser, run, tmp_path, monkeypatch):
    page = Page(browser, server.address)
    page.js("document.querySelector('#model').value = 0, $('model').onchange()")
    page.until("state.model === 0")
    page.at_rest()
    page.keys("k", "ddd", "k", "www", "k")
    assert page.js("keys.length") == 3
    page.at_rest()
    for tool in ("#keys li:nth-child(2) [data-do=later]", "#keys li:nth-child(3) [data-do=delete]"):
        page.browser.find_element("css selector", tool).click()
        page.until("frames.length")
    page.js("$('views').value = 4, $('views').onchange()")
    page.until("frames.length === 4")
    page.get("save").click()
    page.until("!$('result').hidden")
    status, film = ask(server, "progress")
    film = json.loads(film)
    folder = Path(film["folder"])
    assert film["total"] == 4 and film["command"] in page.get("result").text
    stored = paths.read(folder / "cameras.json", 1.0)
    torch.testing.assert_close(stored.c2w[-1], page.c2w())
    words = shlex.split(film["command"])
    assert words[:2] == ["python", "sample.py"]
    sample.main([*words[2:], "--out", str(tmp_path)])
    for name in (*(f"views/{i:03d}.png" for i in range(4)), "path.gif"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    # the view that was seen is the film's
    page.at_rest()
    assert np.array_equal(page.pixels(), np.asarray(Image.open(folder / "views/003.png")).astype(int))


def test_every_path_of_sample_makes_key_frames_and_plays(server, browser):
    page = Page(browser, server.address)
    counts = {}
    for name in server.studio.motions:
        page.choose("motion", name)
        page.until("keys.length && frames.length === 36")
        counts[name] = page.js("keys.length")
        page.js("keys = [], frames = []")
    assert counts == {"orbit": 8, "swing": 8, "spiral": 16, "dolly": 2, "truck": 2, "pedestal": 2, "pan": 4,
                      "tilt": 4, "zoom": 2, "grid": 15}
    page.choose("motion", "dolly")
    page.js("$('views').value = 2, $('views').onchange()")
    page.until("frames.length === 2")
    page.get("play").click()
    page.until("cache[1]")
    page.get("play").click()
    assert not page.js("playing")


def test_a_bad_file_is_told_where_it_belongs_and_a_photo_is_taken(server, browser, tmp_path):
    page, known = Page(browser, server.address), server.studio.subject
    bad, good = tmp_path / "notes.txt", tmp_path / "photo.jpg"
    bad.write_text("no image")
    page.get("file").send_keys(str(bad))
    page.until("$('photoProblem').textContent")
    assert "is not an image" in page.get("photoProblem").text and server.studio.subject is known
    wide = Image.new("RGB", (90, 60), (0, 90, 0))
    wide.paste((200, 0, 0), (60, 0, 90, 60))
    exif = wide.getexif()
    exif[0x0112] = 6            # to be turned to the right: 60 wide, 90 high, red at the bottom
    wide.save(good, exif=exif)
    page.get("file").send_keys(str(good))
    page.until("crop && state.photo.name === 'photo.jpg'")
    assert page.get("photoProblem").text == "" and page.js("[crop.w, crop.h, crop.side]") == [60, 90, 60]
    for _ in range(4):
        page.get("square").send_keys("\ue015")      # down
    page.until("state.photo && !pumping && crop.top > 20")
    page.at_rest()
    bottom = np.asarray(server.studio.subject.photo.picture)[-1, SIZE // 2]
    assert bottom[0] > 150 and server.studio.subject.photo.square.size == (60, 60)
    server.studio.start(known)


def test_a_view_that_is_superseded_while_it_arrives_is_followed_by_the_next(server, browser):
    page = Page(browser, server.address)
    page.at_rest()
    page.js("""(whole => { window.fetch = async (...given) => {
        const answer = await whole(...given);
        if (given[0] !== '/view') return answer;
        window.fetch = whole;
        answer.blob = async () => { window.broken = 1; throw new DOMException('', 'AbortError'); };
        return answer;
    }; moved(); })(fetch)""")
    page.until("window.broken && !pumping")
    page.keys("d")
    page.at_rest()


def test_another_tab_takes_over_and_the_first_can_take_it_back(server, browser):
    page = Page(browser, server.address)
    server.studio.open({})
    page.keys("d")
    page.until("!$('banner').hidden")
    assert "another tab" in page.get("banner").text
    page.get("again").click()
    page.until("$('banner').hidden")
    page.at_rest()


def test_the_page_fits_a_telephone_and_a_dark_room(server, browser):
    page = Page(browser, server.address, 390, 844, dark=True)
    page.choose("motion", "orbit")
    page.until("keys.length === 8 && frames.length")
    assert page.js("document.documentElement.scrollWidth") <= 390
    colours = re.findall(r"\d+", page.js("getComputedStyle(document.body).backgroundColor"))
    assert max(map(int, colours)) < 64
    # every control has a name for who does not see it
    nameless = page.js("""[...document.querySelectorAll('button, input, select')].filter(one => !(one.labels
        && one.labels.length || one.getAttribute('aria-label') || one.textContent.trim())).map(one => one.id)""")
    assert nameless == []
    wrong = [line for line in page.browser.get_log("browser") if line["level"] == "SEVERE"
             and "Failed to load resource" not in line["message"]]
    assert not wrong, "\n".join(line["message"] for line in wrong)


# ---- the command

def test_the_command_prints_its_address_and_ctrl_c_ends_it_at_once(run, tmp_path):
    command = [sys.executable, "view.py", "--checkpoint", str(run), "--data", str(run.parent / "data"),
               "--no-browser", "--device", "cpu", "--out", str(tmp_path)]
    # whoever runs tests in the background ignores Ctrl-C, and so would what they start
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heard) as process:
        try:
            address = re.search(r"http://127.0.0.1:\d+/\?token=\S+", process.stdout.readline())[0]
            host, _, rest = address.removeprefix("http://").partition("/")
            connection = http.client.HTTPConnection(host, timeout=WAIT)
            connection.request("GET", "/" + rest)
            assert connection.getresponse().status == 200
        finally:
            process.send_signal(signal.SIGINT)
            asked = time.monotonic()
        assert process.wait(WAIT) == 130 and time.monotonic() - asked < 5
        assert process.stderr.read().strip() == "view.py: stopped"


def test_a_capture_stands_in_the_map_as_its_cameras_stood(tmp_path, studio):
    subject = studio.open_scene(0, studio.render)
    fov, unit = subject.photo.fov, 3.5      # the capture's own unit of length
    turn = paths.around(40.0, 10.0, 2.0)    # and its own idea of the world
    stood = torch.cat([paths.around(0.0, subject.photo.elevation, 1.0)[None], subject.c2w])
    frames = []
    for i, c2w in enumerate(stood):
        picture = pictures.image(subject.truth(c2w[None], [fov])[0])
        picture.save(tmp_path / f"{i}.png")
        own = c2w.clone()
        own[:3, 3] *= unit
        frames.append({"file_path": f"{i}.png", "transform_matrix": (turn @ own).tolist()})
    focal = SIZE / 2 / math.tan(fov / 2)
    (tmp_path / "transforms.json").write_text(json.dumps(
        {"w": SIZE, "h": SIZE, "fl_x": focal, "fl_y": focal, "cx": SIZE / 2, "cy": SIZE / 2, "frames": frames}))
    found = view.capture(tmp_path, SIZE)
    middle = len(stood) // 2
    assert found.photo.fov == pytest.approx(fov, rel=1e-6) and len(found.c2w) == len(stood)
    torch.testing.assert_close(found.c2w[middle, :3, 3].norm(), torch.tensor(1.0, dtype=torch.float64))
    theirs, ours = (camera.relative_pose(each[middle], each) for each in (stood, found.c2w))
    torch.testing.assert_close(ours[:, :3, :3], theirs[:, :3, :3], rtol=0, atol=1e-6)
    moved = theirs[:, :3, 3].norm(dim=1) > 1e-6
    times = ours[moved, :3, 3].norm(dim=1) / theirs[moved, :3, 3].norm(dim=1)
    torch.testing.assert_close(times, times[:1].expand_as(times), rtol=1e-6, atol=0)
    near = np.asarray(found.real(0)).astype(int) - np.asarray(Image.open(tmp_path / "0.png"))
    assert abs(near).max() <= 1


def test_a_smooth_path_passes_its_key_frames_and_an_orbit_is_round():
    keys = paths.motion("orbit", 8, 360, 1.0, 20)
    found = paths.smooth(keys, 32, True)
    torch.testing.assert_close(found.c2w[::4], keys.c2w, rtol=0, atol=1e-9)
    assert found.centred() and found.closed
    turns = paths.around(torch.arange(32) * 11.25, 20.0, 1.0)
    torch.testing.assert_close(found.c2w, turns, rtol=0, atol=1e-9)
    other = torch.cat([keys.c2w[:2], paths.motion("pan", 2, 40, 1.0, 0).c2w[1:]])
    fov = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    found = paths.smooth(replace(keys, c2w=other, fov=fov), 9, False)
    torch.testing.assert_close(found.c2w[::4], other, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.fov[::4], fov)
    cameras.check_rigid(found.c2w, "the path")


@pytest.mark.skipif("PICTURES" not in os.environ, reason="PICTURES=FOLDER takes the pictures of the page there")
def test_pictures_of_the_page(browser):
    command = [sys.executable, "view.py", "--no-browser", "--device", "cpu", "--checkpoint",
               "weights/small.safetensors", "--config", "configs/synth.py"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://\S+", process.stdout.readline())[0]
            for name, width, height, dark in (("page", 1280, 940, False), ("page_dark", 1280, 940, True),
                                              ("page_390", 390, 1500, False)):
                page = Page(browser, address, width, height, dark)
                page.choose("motion", "swing")
                page.until("keys.length === 8 && frames.length === 36")
                page.keys("\ue014" * 2)
                page.at_rest()
                file = ROOT / os.environ["PICTURES"] / f"{name}.png"
                page.js("window.scrollTo(0, 0)")
                browser.save_screenshot(str(file))
                Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)     # small enough to keep
        finally:
            process.send_signal(signal.SIGINT)
