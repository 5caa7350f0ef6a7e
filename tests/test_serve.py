"""The HTTP API on lance-nano: results are the Pipeline's, errors are what OpenAI's clients expect, nothing is fetched.

Skipped without requirements-serve.txt; the client tests without `openai`.
"""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="requirements-serve.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements-serve.txt is not installed")
pytest.importorskip("python_multipart", reason="requirements-serve.txt is not installed")
pytest.importorskip("httpx", reason="the test client needs httpx")

import serve
from lance_nano import CHECKPOINT
from lance_quant.errors import InputError
from lance_quant.inference.pipeline import Pipeline, Progress, Stopped
from lance_quant.lance.media.video import write_video
from lance_quant.serving import inputs, loading, server
from lance_quant.serving.api import create_app
from lance_quant.serving.engine import Busy, Engine, Limits, TookTooLong
from lance_quant.serving.results import Results

SIZE = {"height": 48, "width": 64}
SMALL = {"num_inference_steps": 2, "size": "64x48", "seed": 3}
LIMITS = Limits(
    waiting=4, seconds=60, body_bytes=3_000_000, pixels=1_000_000, tokens=64, pictures=4, frames=9, steps=10
)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def client(pipeline):
    from fastapi.testclient import TestClient

    engine = Engine({"nano": pipeline, "again": pipeline}, LIMITS)
    app = create_app(engine, sizes={"nano": SIZE}, presets={"nano": "image_112res"})
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    engine.close()


def png(image=None) -> bytes:
    out = io.BytesIO()
    (image or Image.new("RGB", (64, 64), "red")).save(out, "PNG")
    return out.getvalue()


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def asking(text="What is this?", shown=None, **more):
    part = {"type": "image_url", "image_url": {"url": url(png()) if shown is None else shown}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}], "max_tokens": 6, **more}


def clip_file(tmp_path, frames=13) -> bytes:
    write_video(tmp_path / "c.mp4", [Image.new("RGB", (64, 64), (index * 9, 40, 90)) for index in range(frames)])
    return (tmp_path / "c.mp4").read_bytes()


def shown(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# What is served


def test_models_and_health_say_what_is_loaded(client):
    assert client.get("/health").json() == {"status": "ok", "models": ["nano", "again"], "waiting": 0, "running": None}
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["nano", "again"]
    assert client.get("/v1/models/again").json()["object"] == "model"
    assert client.get("/v1/models/other").status_code == 404


def test_an_answer_is_the_pipelines(client, pipeline):
    found = client.post("/v1/chat/completions", json=asking()).json()
    image = Image.new("RGB", (64, 64), "red")
    assert found["choices"][0]["message"]["content"] == pipeline.ask(
        image, "What is this?", max_new_tokens=6, resolution="image_112res"
    )
    usage = found["usage"]
    assert usage["prompt_tokens"] == pipeline.prompt_tokens and 1 <= usage["completion_tokens"] <= 6
    assert found["choices"][0]["finish_reason"] == ("length" if usage["completion_tokens"] == 6 else "stop")
    assert "lance" not in found


def test_a_stream_is_the_same_answer_in_pieces(client):
    whole = client.post("/v1/chat/completions", json=asking()).json()
    with client.stream(
        "POST", "/v1/chat/completions", json=asking(stream=True, stream_options={"include_usage": True})
    ) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks if one["choices"])
    assert text.strip() == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-2]["choices"][0]["finish_reason"]


def test_a_conversation_asks_its_last_question_and_says_what_was_left_out(client):
    first, image = asking("First?")["messages"][0], url(png())
    body = asking("Second?", image) | {
        "messages": [first, {"role": "assistant", "content": "One."}, {"role": "user", "content": "Second?"}]
    }
    found = client.post("/v1/chat/completions", json=body).json()
    alone = client.post("/v1/chat/completions", json=asking("Second?", image)).json()
    assert found["choices"][0]["message"] == alone["choices"][0]["message"]
    assert found["lance"] == {"earlier_questions_left_out": 1}


def test_questions_about_clips_are_answered(client, tmp_path):
    part = {"type": "video_url", "video_url": {"url": url(clip_file(tmp_path), "video/mp4")}}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What moves?"}]}], "max_tokens": 3}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] <= 3


def test_pictures_are_the_pipelines_with_seeds_that_count_up(client, pipeline):
    found = client.post("/v1/images/generations", json={"prompt": "a red circle", "n": 2, **SMALL}).json()
    for index, one in enumerate(found["data"]):
        content = base64.b64decode(one["b64_json"])
        drawn = pipeline.draw("a red circle", seed=3 + index, num_timesteps=2, **SIZE)
        assert np.array_equal(shown(content), np.asarray(drawn))
        assert json.loads(Image.open(io.BytesIO(content)).text["lance"])["seed"] == 3 + index
    assert len(found["data"]) == 2


@pytest.mark.parametrize(("fmt", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_a_url_gives_the_file(client, fmt, magic):
    body = {"prompt": "x", "response_format": "url", "output_format": fmt, **SMALL}
    found = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    answer = client.get(found)
    assert answer.content.startswith(magic) and answer.headers["content-type"] == f"image/{fmt}"
    assert client.get("/v1/files/none.png").status_code == 404


def test_edits_and_variations_are_the_pipelines(client, pipeline):
    image, how = Image.new("RGB", (112, 112), "red"), {"num_timesteps": 2, "seed": 5, "resolution": "image_112res"}
    form = {"prompt": "make it blue", "num_inference_steps": "2", "seed": "5"}
    found = client.post("/v1/images/edits", data=form, files={"image": ("a.png", png(image))}).json()
    edited = pipeline.edit(image, "make it blue", **how)
    assert np.array_equal(shown(base64.b64decode(found["data"][0]["b64_json"])), np.asarray(edited))
    as_json = client.post(
        "/v1/images/edits", json={**form, "num_inference_steps": 2, "seed": 5, "image": url(png(image))}
    ).json()
    assert as_json["data"] == found["data"]
    varied = client.post("/v1/images/variations", data={"num_inference_steps": "2"}, files={"image": ("a.png", png())})
    assert len(varied.json()["data"]) == 1


def waited(client, name):
    for _ in range(600):
        job = client.get(f"/v1/videos/{name}").json()
        if job["status"] in ("completed", "failed"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


@pytest.mark.parametrize("reference", [None, "picture", "clip"])
def test_a_clip_is_a_job_with_progress_and_content(client, tmp_path, reference):
    files = {
        "picture": {"input_reference": ("a.png", png())},
        "clip": {"input_reference": ("c.mp4", clip_file(tmp_path))},
    }
    form = {"prompt": "a ball rolls", "num_frames": "5", "num_inference_steps": "2"}
    made = client.post("/v1/videos", data=form, files=files.get(reference, {"none": ("", b"")}))
    job = waited(client, made.json()["id"])
    assert job["status"] == "completed" and job["progress"] == 100 and job["error"] is None, job
    content = client.get(f"/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4" and content.content[4:8] == b"ftyp"
    assert job["id"] in [one["id"] for one in client.get("/v1/videos").json()["data"]]
    assert client.delete(f"/v1/videos/{job['id']}").json()["deleted"]
    assert client.get(f"/v1/videos/{job['id']}").status_code == 404


def test_metrics_count_what_was_done(client):
    client.post("/v1/images/generations", json={"prompt": "x", **SMALL})
    text = client.get("/metrics").text
    assert 'lance_requests_total{model="nano",outcome="done"}' in text and "lance_waiting_requests 0.0" in text


# What is refused

REMOTE = [
    "http://169.254.169.254/latest/meta-data",
    "https://example.com/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "ftp://x/a.png",
    "gopher://x",
    "data:image/png,abc",
    "data:image/png;base64,###",
    "data:",
    "",
]


@pytest.mark.parametrize("address", REMOTE)
def test_nothing_is_fetched_for_a_client(client, address):
    for body in (
        asking(shown=address),
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": address}}]}]},
    ):
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", answer.text


BAD_CHATS = [
    {},
    {"messages": []},
    {"messages": "x"},
    {"messages": [{"role": "x", "content": "y"}]},
    {"messages": [{"role": "user", "content": "no picture"}]},
    asking(max_tokens=0),
    asking(max_tokens=65),
    asking(max_tokens=10**9),
    asking(temperature=-1),
    asking(temperature="hot"),
    asking(top_p=0),
    asking(top_p=2),
    asking(n=2),
    asking(stop=["x"]),
    asking(tools=[{}]),
    asking(logprobs=True),
    asking(seed=-1),
    asking(seed=2**63),
    asking(resolution="huge"),
    asking(shown=url(b"no picture")),
    asking(shown=url(png()[:50])),
    asking("<|video_pad|>"),
    asking(shown=url(png(Image.new("1", (2000, 1000))))),
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(png())}}] * 2}]},
]


@pytest.mark.parametrize("body", BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_questions_that_make_no_sense_are_answered_with_400(client, body):
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"] and error["message"]


BAD_DRAWINGS = [
    {},
    {"prompt": ""},
    {"prompt": 3},
    {"prompt": "x", "n": 0},
    {"prompt": "x", "n": 5},
    {"prompt": "x", "n": "a"},
    {"prompt": "x", "size": "0x0"},
    {"prompt": "x", "size": "8x8"},
    {"prompt": "x", "size": "99999x99999"},
    {"prompt": "x", "size": "big"},
    {"prompt": "x", "size": "-64x64"},
    {"prompt": "x", "seed": -1},
    {"prompt": "x", "num_inference_steps": 0},
    {"prompt": "x", "num_inference_steps": 11},
    {"prompt": "x", "guidance_scale": -1},
    {"prompt": "x", "guidance_scale": 1e9},
    {"prompt": "x", "response_format": "file"},
    {"prompt": "x", "output_format": "eps"},
    {"prompt": "x", "stream": True},
    {"prompt": "<|vision_start|>"},
    {"prompt": "x", "timestep_shift": 0},
]


@pytest.mark.parametrize("body", BAD_DRAWINGS, ids=range(len(BAD_DRAWINGS)))
def test_drawings_that_make_no_sense_are_answered_with_400(client, body):
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


BAD_EDITS = [
    ({}, {}),
    ({"prompt": "x"}, {}),
    ({"prompt": "x"}, {"image": ("a", b"no")}),
    ({"prompt": "x", "size": "64x64"}, {"image": ("a", png())}),
    ({"prompt": "x"}, {"image": ("a", b"")}),
    ({"prompt": "x"}, {"image": ("a", png()), "mask": ("m", png())}),
    ({"prompt": ""}, {"image": ("a", png())}),
    ({"prompt": "x", "num_inference_steps": "1e9"}, {"image": ("a", png())}),
    ({"prompt": "x", "resolution": "x"}, {"image": ("a", png())}),
]


@pytest.mark.parametrize(("form", "files"), BAD_EDITS, ids=range(len(BAD_EDITS)))
def test_edits_that_make_no_sense_are_answered_with_400(client, form, files):
    assert client.post("/v1/images/edits", data=form, files=files or {"none": ("n", b"")}).status_code == 400


def test_a_model_that_is_not_loaded_is_404_and_a_wrong_method_405(client):
    answer = client.post("/v1/chat/completions", json=asking(model="gpt-5"))
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 50_000, b'{"messages": NaN}'])
def test_bodies_that_are_no_requests_are_answered_with_400(client, content):
    for path in ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"):
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, answer.text)


def test_large_bodies_are_refused_before_they_are_read(client):
    big = asking(shown="data:image/png;base64," + "A" * 4_000_000)
    assert client.post("/v1/chat/completions", json=big).status_code == 413

    def unannounced():
        for _ in range(50):
            yield b"x" * 100_000

    answer = client.post("/v1/chat/completions", content=unannounced(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "limit" in answer.json()["error"]["message"]


def test_pages_of_other_sites_and_other_names_are_kept_out(pipeline):
    from fastapi.testclient import TestClient

    engine = Engine({"nano": pipeline}, LIMITS)
    client = TestClient(create_app(engine, hosts=["127.0.0.1", "testserver"]))
    body = {"prompt": "x", **SMALL}
    assert (
        client.post("/v1/images/generations", json=body, headers={"origin": "https://evil.example"}).status_code == 403
    )
    assert client.post("/v1/images/generations", json=body, headers={"origin": "http://testserver"}).status_code == 200
    assert client.get("/health", headers={"host": "rebound.example"}).status_code == 400
    engine.close()


def test_a_key_is_asked_for_where_one_is_set(pipeline):
    from fastapi.testclient import TestClient

    engine = Engine({"nano": pipeline}, LIMITS)
    client = TestClient(create_app(engine, api_key="secret"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret2"}, {"authorization": "Bearer"}):
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200
    engine.close()


# The engine


def blocked(event):
    def work(_, on_step):
        for index in range(1000):
            on_step(Progress(index, 1000, "step"))
            if event.wait(0.01):
                return index
        raise AssertionError("was never let go")

    return work


def test_a_full_line_says_when_to_come_back(pipeline):
    event, engine = threading.Event(), Engine({"nano": pipeline}, Limits(waiting=2))
    jobs = [engine.submit("nano", blocked(event)) for _ in range(3)]
    with pytest.raises(Busy) as busy:
        engine.submit("nano", blocked(event))
    assert busy.value.retry_after >= 1
    event.set()
    assert all(job.future.result(10) >= 0 for job in jobs)
    assert engine.submit("nano", lambda *_: 7).future.result(10) == 7 and engine.waiting == 0
    engine.close()


def test_who_leaves_is_taken_out_of_the_line_or_stopped(pipeline):
    event, engine = threading.Event(), Engine({"nano": pipeline}, Limits(waiting=2))
    running, waiting = engine.submit("nano", blocked(event)), engine.submit("nano", blocked(event))
    while running.progress is None:
        time.sleep(0.01)
    engine.cancel(waiting)
    engine.cancel(running)
    for job in (running, waiting):
        with pytest.raises(Stopped):
            job.future.result(10)
    assert engine.submit("nano", lambda *_: 7).future.result(10) == 7
    engine.close()


def test_a_request_that_takes_too_long_is_ended_and_a_bug_is_its_own(pipeline):
    engine = Engine({"nano": pipeline}, Limits(seconds=0.05))
    with pytest.raises(TookTooLong):
        engine.submit("nano", blocked(threading.Event())).future.result(10)
    with pytest.raises(ZeroDivisionError):
        engine.submit("nano", lambda *_: 1 // 0).future.result(10)
    assert engine.submit("nano", lambda *_: 7).future.result(10) == 7
    engine.close()


def test_closing_ends_what_runs_and_what_waits(pipeline):
    engine = Engine({"nano": pipeline}, Limits(waiting=4))
    jobs = [engine.submit("nano", blocked(threading.Event())) for _ in range(3)]
    while jobs[0].progress is None:
        time.sleep(0.01)
    engine.close()
    for job in jobs:
        with pytest.raises(Stopped):
            job.future.result(1)
    with pytest.raises(Busy):
        engine.submit("nano", lambda *_: 7)


def test_a_full_line_is_429_with_retry_after(pipeline):
    from fastapi.testclient import TestClient

    event, engine = threading.Event(), Engine({"nano": pipeline}, Limits(waiting=0))
    client = TestClient(create_app(engine))
    job = engine.submit("nano", blocked(event))
    answer = client.post("/v1/images/generations", json={"prompt": "x", **SMALL})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    event.set()
    job.future.result(10)
    engine.close()


def test_many_at_once_get_their_own_answers(client, pipeline):
    """Five places (one runs, four wait): who is refused comes back, as OpenAI's clients do."""
    seeds = list(range(12))
    wanted = {seed: np.asarray(pipeline.draw("a red circle", seed=seed, num_timesteps=2, **SIZE)) for seed in seeds}

    def draw(seed):
        while True:
            answer = client.post("/v1/images/generations", json={"prompt": "a red circle", **SMALL, "seed": seed})
            if answer.status_code != 429:
                return shown(base64.b64decode(answer.json()["data"][0]["b64_json"]))
            time.sleep(0.05)

    with ThreadPoolExecutor(12) as pool:
        for seed, drawn in zip(seeds, pool.map(draw, seeds), strict=True):
            assert np.array_equal(drawn, wanted[seed]), seed


def test_results_are_bounded_and_the_oldest_go_first():
    results = Results(100)
    names = [results.put(b"x" * 40, "image/png", "png") for _ in range(4)]
    assert [results.get(name) is not None for name in names] == [False, False, True, True]
    results.drop(names[2])
    assert results.get(names[2]) is None and len({*names}) == 4


def test_inputs_leave_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.tempfile, "tempdir", str(tmp_path))
    inputs.picture(png(), LIMITS, "the image")
    for content in (b"", b"no", png()[:40]):
        with pytest.raises(InputError, match="the image") as error:
            inputs.picture(content, LIMITS, "the image")
        assert str(tmp_path) not in str(error.value)
        with pytest.raises(InputError), inputs.clip(content, LIMITS, "the video"):
            pass
    assert not list(tmp_path.iterdir())


# The script


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_path", "nowhere"], "--model_path nowhere is no Lance folder"),
        (["--awq_dir", "."], "is no packed folder"),
        (["--port", "99999"], "--port 99999 must be at"),
        (["--waiting", "-1"], "--waiting -1"),
        (["--max_seconds", "nan"], "--max_seconds nan"),
        (["--max_body_mb", "0"], "--max_body_mb 0"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(flags, message):
    pytest.importorskip("uvicorn", reason="requirements-serve.txt is not installed")
    with pytest.raises(InputError) as error:
        serve.main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded():
    pytest.importorskip("uvicorn", reason="requirements-serve.txt is not installed")
    with server.listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match="cannot listen on 127.0.0.1 port"):
            serve.main(["--port", str(taken.getsockname()[1])])


def test_the_small_lance_is_served_in_floats_and_in_4_bits():
    loaded = loading.load(None, [], device="cpu")
    assert list(loaded.pipelines) == [CHECKPOINT.name, f"{CHECKPOINT.name}-int4"]
    assert set(loaded.sizes) == set(loaded.pipelines) and loaded.presets[CHECKPOINT.name] == "image_112res"
    small, large = (loaded.sizes_on_disk[name] for name in (f"{CHECKPOINT.name}-int4", CHECKPOINT.name))
    assert small < 0.5 * large


# OpenAI's own client, over the network


@pytest.fixture(scope="module")
def openai_client(pipeline):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="requirements-serve.txt is not installed")
    engine = Engine({"nano": pipeline}, LIMITS)
    app = create_app(engine, api_key="secret", sizes={"nano": SIZE}, presets={"nano": "image_112res"})
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    listener = server.listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    yield openai, openai.OpenAI(base_url=address, api_key="secret", max_retries=0), address
    running.should_exit = True
    thread.join()
    engine.close()


def test_openais_client_chats_streams_draws_edits_and_lists(openai_client, tmp_path):
    _, client, _ = openai_client
    assert [one.id for one in client.models.list()] == ["nano"]
    body = asking()
    whole = client.chat.completions.create(model="nano", messages=body["messages"], max_tokens=6)
    pieces = client.chat.completions.create(
        model="nano", messages=body["messages"], max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(pieces)
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text.strip() == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    more = {"num_inference_steps": 2, "seed": 3}
    drawn = client.images.generate(model="nano", prompt="a red circle", size="64x48", extra_body=more)
    assert base64.b64decode(drawn.data[0].b64_json).startswith(b"\x89PNG")
    (tmp_path / "a.png").write_bytes(png())
    with open(tmp_path / "a.png", "rb") as image:
        edited = client.images.edit(model="nano", image=image, prompt="make it blue", extra_body=more)
    assert base64.b64decode(edited.data[0].b64_json).startswith(b"\x89PNG")


def test_openais_client_makes_a_clip(openai_client):
    _, client, _ = openai_client
    job = client.videos.create(model="nano", prompt="a ball", extra_body={"num_frames": 5, "num_inference_steps": 2})
    for _ in range(600):
        job = client.videos.retrieve(job.id)
        if job.status in ("completed", "failed"):
            break
        time.sleep(0.05)
    assert job.status == "completed" and client.videos.download_content(job.id).content[4:8] == b"ftyp"


def test_openais_client_raises_its_own_errors(openai_client):
    openai, client, address = openai_client
    for error, call in (
        (openai.NotFoundError, lambda: client.chat.completions.create(model="x", messages=asking()["messages"])),
        (openai.BadRequestError, lambda: client.images.generate(model="nano", prompt="x", n=9)),
        (openai.BadRequestError, lambda: client.chat.completions.create(model="nano", messages=[])),
        (openai.AuthenticationError, openai.OpenAI(base_url=address, api_key="no", max_retries=0).models.list),
    ):
        with pytest.raises(error) as raised:
            call()
        assert raised.value.body["message"]


def test_a_client_that_leaves_frees_the_worker(openai_client):
    openai, client, address = openai_client
    import httpx

    quick = openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        quick.images.generate(model="nano", prompt="x", size="512x512", extra_body={"num_inference_steps": 10})
    messages = asking()["messages"]
    with client.chat.completions.create(model="nano", messages=messages, max_tokens=60, stream=True) as answer:
        next(iter(answer))
    health = address.removesuffix("/v1") + "/health"
    for _ in range(100):
        if httpx.get(health).json()["running"] is None:
            break
        time.sleep(0.1)
    assert httpx.get(health).json() == {"status": "ok", "models": ["nano"], "waiting": 0, "running": None}
