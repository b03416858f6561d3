from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import Reward, RewardError, load_reward
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
from diffalign.rewards.remote.client import RemoteReward
from diffalign.rewards.remote.protocol import TOKEN_VARIABLE, Limits
from diffalign.rewards.remote.transport import Address, Unreachable

from .conftest import Scripted, ScriptedServer, Serve, pictures, red, right, well
from .test_server import Best, Picky, flat

Script = Callable[..., ScriptedServer]
CAPTION = "a red circle on a white background"


def remote(*addresses: str, **options: Any) -> RemoteReward:
    made = load_reward("remote", addresses=list(addresses), **{"backoff_seconds": 0.01, "timeout": 5.0, **options})
    assert isinstance(made, RemoteReward)
    return made


def counted(server: Any) -> list[int]:
    """Numbers of items of each request that a real server answers from now on."""
    sizes: list[int] = []
    answer = server.answer

    def spy(content: bytes) -> Any:
        result = answer(content)
        sizes.append(len(result["items"]))
        return result

    server.answer = spy
    return sizes


def test_round_trip_gives_the_local_scores(serve: Serve) -> None:
    server = serve({"red": red, "shapes-checker": "shapes-checker", "shapes-clip": "shapes-clip"})
    images = [*pictures(3, (64, 64)), *pictures(2, (48, 64))]
    for name in server.rewards:
        local = server.rewards[name].reward
        reward = load_reward(f"remote:{server.address}/{name}", batch_size=2)
        here, there = local(images, CAPTION), reward(images, CAPTION)
        torch.testing.assert_close(there.rewards, here.rewards, atol=1e-6, rtol=0)
        assert there.details.keys() == here.details.keys()
        for key, value in here.details.items():
            torch.testing.assert_close(there.details[key], value, atol=1e-6, rtol=0)
        assert there.valid.all() and there.rewards.dtype == torch.float32
        assert (reward.name, reward.identity, reward.version) == (name, local.identity, local.version)
        assert (reward.uses_prompt, reward.scale, reward.mode) == (local.uses_prompt, local.scale, local.mode)
        reward.close()


def test_tensors_are_rounded_to_8_bits_and_scores_return_to_their_device(serve: Serve) -> None:
    batch = torch.full((2, 3, 4, 4), 0.501)
    output = remote(serve().address)(batch, "x")
    assert output.rewards.tolist() == pytest.approx([128 / 255] * 2)


def test_nothing_is_asked_before_it_is_needed(serve: Serve) -> None:
    reward = remote("http://127.0.0.1:9/red")  # nobody listens there
    assert (RemoteReward.uses_prompt, RemoteReward.mode, RemoteReward.card().name) == (True, "pointwise", "remote")
    assert reward.name == "red" and not reward.differentiable


def test_images_are_divided_among_requests(serve: Serve) -> None:
    server = serve()
    sizes = counted(server)
    output = remote(server.address, batch_size=4, concurrency=3)(pictures(10), [str(i) for i in range(10)])
    assert sorted(sizes) == [2, 4, 4]
    assert output.rewards.tolist() == load_reward(red)(pictures(10), "x").rewards.tolist()


def test_requests_keep_to_the_servers_limits(serve: Serve) -> None:
    server = serve(limits=Limits(items=5, request_pixels=70))
    sizes = counted(server)
    assert remote(server.address)(pictures(10, (5, 6)), "x").valid.all(), "30 pixels an image: two a request"
    assert sizes == [2] * 5
    tight = serve(limits=Limits(body_bytes=1200))
    sizes = counted(tight)
    assert remote(tight.address)(pictures(4, (5, 6)), "x", [{"note": "n" * 50}] * 4).valid.all()
    assert 1 < len(sizes) <= 4
    large = serve(limits=Limits(pixels=10))
    output = remote(large.address)(pictures(1), "x")
    assert "over the limit of 10 pixels" in str(output.messages[0])


def test_metadata_that_json_cannot_say(serve: Serve) -> None:
    reward = remote(serve().address)
    for value in (object(), math.nan):
        with pytest.raises(UserError, match="metadata of image 1 cannot be sent"):
            reward(pictures(2), "x", [{}, {"a": value}])


def test_groups_stay_in_one_request(serve: Serve) -> None:
    server = serve({"best": Best()})
    sizes = counted(server)
    reward = remote(server.address + "/best", batch_size=3)
    images = list(map(flat, (10, 20, 30, 40, 50, 60, 70)))
    output = reward(images, group_ids=[7, 8, 7, 8, 9, 7, 7])
    assert output.rewards.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert sorted(sizes) == [3, 4], "the group of four is larger than a request and still whole"
    with pytest.raises(UserError, match="group_ids"):
        reward(images)


def test_several_servers_share_the_work_and_stand_in_for_each_other(serve: Serve, caplog: Any) -> None:
    servers = [serve(), serve()]
    sizes = [counted(server) for server in servers]
    reward = remote(f"{servers[0].address}/red", servers[1].address, batch_size=1, concurrency=1)
    assert reward(pictures(6), "x").valid.all()
    assert [sum(part) for part in sizes] == [3, 3]
    servers[0].stop()
    servers[0].close()
    assert reward(pictures(6), "x").valid.all()
    assert sum(sizes[1]) == 9


def test_servers_of_different_scorers_are_not_mixed(serve: Serve) -> None:
    def other(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return images[:, 1].mean((1, 2))

    with pytest.raises(UserError, match="cannot be mixed"):
        remote(serve().address, serve({"red": other}).address)(pictures(1), "x")


def test_in_the_background(serve: Serve) -> None:
    reward = remote(serve().address, batch_size=1)
    batch = torch.stack([torch.full((3, 4, 4), value / 255) for value in (51.0, 102.0)])
    waiting = [reward.submit(batch, "x") for _ in range(5)]
    batch.zero_()
    for future in waiting:
        assert future.result(10).rewards.tolist() == pytest.approx([0.2, 0.4])
    assert isinstance(remote("http://127.0.0.1:9", retries=0).submit(batch, "x").exception(10), RewardError)
    reward.close()


def hang(handler: Scripted, asked: dict[str, Any]) -> None:
    time.sleep(1.0)


def trickle(handler: Scripted, asked: dict[str, Any]) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def cut(handler: Scripted, asked: dict[str, Any]) -> None:
    """The server is killed in the middle of its answer."""
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{"version": 1, "items": [')


def vanish(handler: Scripted, asked: dict[str, Any]) -> None:
    """The server is killed while it scores."""
    handler.close_connection = True


def says(status: int, payload: Any) -> Any:
    return lambda handler, asked: handler.say(status, payload)


def scored(value: Any) -> Any:
    def say(handler: Scripted, asked: dict[str, Any]) -> None:
        answer = right(asked)
        answer["items"][0]["scores"]["red"]["reward"] = value
        handler.say(200, answer)

    return say


def short(handler: Scripted, asked: dict[str, Any]) -> None:
    answer = right(asked)
    answer["items"].pop()
    handler.say(200, answer)


def strange(handler: Scripted, asked: dict[str, Any]) -> None:
    handler.say(200, {**right(asked), "identities": {"red": "red/2/b"}})


TRANSIENT = {
    "hangs": (hang, "did not answer within 0.3 s"),
    "trickles": (trickle, "did not answer within 0.3 s"),
    "is cut off": (cut, "IncompleteRead"),
    "vanishes": (vanish, "RemoteDisconnected"),
    "breaks": (says(500, {"error": "out of memory"}), "status 500: out of memory"),
    "is busy": (says(503, b"<html>"), "status 503"),
}
LASTING = {
    "garbage": (says(200, b"<html>hello"), "not JSON"),
    "nan": (scored(math.nan), "scored as nan"),
    "inf": (scored(math.inf), "scored as inf"),
    "text": (scored("good"), "scored as 'good'"),
    "too few": (short, "2 items were answered, 3 asked"),
    "another checkpoint": (strange, "now runs red/2/b, not red/1/a"),
    "refused": (says(413, {"error": "too large"}), "status 413: too large"),
}


@pytest.mark.parametrize("kind", [*TRANSIENT, *LASTING])
def test_a_failure_is_no_score(scripted: Script, kind: str) -> None:
    say, message = {**TRANSIENT, **LASTING}[kind]
    server = scripted(say)
    output = remote(server.address, timeout=0.3, retries=1)(pictures(3), "x")
    assert not output.valid.any() and output.rewards.isnan().all()
    assert all(message in str(text) for text in output.messages), output.messages
    assert len(server.asked) == (2 if kind in TRANSIENT else 1)
    with pytest.raises(RewardError, match="image 0"):
        guarded(remote(server.address, timeout=0.3, retries=0), pictures(3), "x", policy=FailurePolicy("stop"))


@pytest.mark.parametrize("kind", TRANSIENT)
def test_what_passes_is_asked_again(scripted: Script, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    server = scripted(TRANSIENT[kind][0], well)
    assert remote(server.address, timeout=0.3)(pictures(3), "x").rewards.tolist() == [0.5] * 3
    assert len(server.asked) == 2 and "asking again in 0.01 s (1 of 3)" in caplog.text


def test_pauses_double(scripted: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("diffalign.rewards.remote.transport.time.sleep", pauses.append)
    monkeypatch.setattr("diffalign.rewards.remote.transport.LONGEST_WAIT", 5.0)
    server = scripted(says(502, {}))
    assert not remote(server.address, retries=4, backoff_seconds=1.0)(pictures(1), "x").valid.any()
    assert pauses == [1, 2, 4, 5]


@pytest.mark.parametrize(("status", "message"), [(401, "no token"), (404, "no reward"), (302, "elsewhere")])
def test_what_is_refused_stops_at_once(scripted: Script, status: int, message: str) -> None:
    server = scripted(says(status, {"error": message}))
    with pytest.raises(UserError, match=f"status {status}: {message}"):
        remote(server.address)(pictures(3), "x")
    assert len(server.asked) == 1


def test_one_request_that_fails_costs_only_its_images(scripted: Script) -> None:
    server = scripted(well, says(200, b"garbage"), well)
    reward = remote(server.address, batch_size=2, concurrency=1)
    output = reward(pictures(6), "x")
    assert output.valid.tolist() == [True, True, False, False, True, True]
    assert output.rewards[[0, 1, 4, 5]].tolist() == [0.5] * 4


def test_no_server_is_an_error_with_a_remedy() -> None:
    with pytest.raises(Unreachable, match="diffalign serve-reward.*asked 2 times"):
        remote("http://127.0.0.1:9/red", retries=1)(pictures(1), "x")


def test_a_server_that_is_no_reward_server(scripted: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    server = scripted(well)
    for said in ({"rewards": "red"}, {"rewards": [{"name": "red"}]}, {"rewards": []}, b"hello"):
        monkeypatch.setattr(Scripted, "do_GET", lambda handler, said=said: handler.say(200, said))
        with pytest.raises(RewardError, match="reward server|how large|not JSON"):
            remote(server.address)(pictures(1), "x")


def test_which_reward_of_the_server(serve: Serve) -> None:
    server = serve({"red": red, "best": Best()})
    assert remote(server.address, reward="red")(pictures(1), "x").valid.all()
    with pytest.raises(UserError, match="several rewards.*red, best.*/NAME"):
        remote(server.address)(pictures(1), "x")
    with pytest.raises(UserError, match="no reward 'rad'. Did you mean 'red'"):
        remote(server.address + "/rad")(pictures(1), "x")


def test_the_token(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    server = serve(token="open-sesame")
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="401: no token was sent"):
        remote(server.address)(pictures(1), "x")
    file = tmp_path / "token"
    file.write_text("open-sesame\n")
    assert remote(server.address, token_file=file)(pictures(1), "x").valid.all()
    monkeypatch.setenv(TOKEN_VARIABLE, "open-barley")
    with pytest.raises(UserError, match="401: .*another one than was sent") as stop:
        remote(server.address)(pictures(1), "x")
    assert "open-" not in str(stop.value)
    for content in ("", "two\nlines", "\xe4"):
        file.write_text(content)
        with pytest.raises(UserError, match="one line of printable ASCII"):
            remote(server.address, token_file=file)
    with pytest.raises(UserError, match="cannot be read"):
        remote(server.address, token_file=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs an address"),
        ({"checkpoint": "ftp://x/red"}, "not the address of a reward server"),
        ({"checkpoint": "http://host:port/red"}, "not the address of a reward server"),
        ({"checkpoint": "http://me:secret@host/red"}, "must not. A token belongs into"),
        ({"checkpoint": "http://a/red,http://b/blue"}, "of one reward, got blue, red"),
        ({"checkpoint": "http://a/red", "reward": "blue"}, "of one reward, got blue, red"),
        ({"checkpoint": "http://a/red", "timeout": 0}, "timeout above 0"),
        ({"checkpoint": "http://a/red", "retries": -1}, "retries of the reward remote must be at least 0"),
        ({"checkpoint": "http://a/red", "batch_size": 0}, "batch_size"),
        ({"checkpoint": "http://a/red", "serve": {"lazy": True}}, "only with python="),
        ({"checkpoint": "http://a/red", "python": "/usr/bin/python3"}, "takes no addresses"),
        ({"python": "/nowhere/python", "reward": "red"}, "no Python interpreter /nowhere/python"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as stop:
        load_reward("remote", **options)
    assert "secret" not in str(stop.value)


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("http://127.0.0.1:8000/hpsv3", "http://127.0.0.1:8000", "hpsv3"),
        ("localhost:8000", "http://localhost:8000", ""),
        ("https://a.example/scores/hpsv3", "https://a.example:443/scores", "hpsv3"),
        ("http://[::1]:80/x", "http://[::1]:80", "x"),
    ],
)
def test_addresses(text: str, address: str, name: str) -> None:
    parsed, found = Address.parse(text)
    assert (str(parsed), found) == (address, name)


def training_loop(reward: Reward, policy: FailurePolicy, ledger: FailureLedger, done: list[float]) -> list[float]:
    """What a trainer does with rewards: steps that it has done are kept, a step takes what has a score."""
    for step in range(len(done), 6):
        output = guarded(reward, pictures(4), f"step {step}", policy=policy, ledger=ledger)
        done.append(output.rewards[output.valid].mean().item())
    return done


def test_training_stops_where_the_server_dies_and_goes_on_with_nothing_lost(scripted: Script) -> None:
    server = scripted(well, well, vanish)
    ledger, done = FailureLedger(), list[float]()
    with pytest.raises(RewardError, match=r"image 0 \(prompt 'step 2'\).*RemoteDisconnected"):
        training_loop(remote(server.address, retries=1), FailurePolicy("stop"), ledger, done)
    assert done == [0.5, 0.5]
    server.script[:] = [well]
    assert training_loop(remote(server.address), FailurePolicy("stop"), ledger, done) == [0.5] * 6


def test_training_tries_again_and_drops_by_policy(scripted: Script, caplog: pytest.LogCaptureFixture) -> None:
    server, ledger = scripted(well, scored(math.nan), well), FailureLedger()
    retry = FailurePolicy("retry", backoff_seconds=0.01)
    assert training_loop(remote(server.address), retry, ledger, []) == [0.5] * 6
    assert ledger.retried["red"] == 1 and ledger.failed["red"] == 0

    def dark(handler: Scripted, asked: dict[str, Any]) -> None:
        answer = right(asked)
        answer["items"][1] = {"id": "1", "scores": {}, "errors": {"red": "too dark"}}
        handler.say(200, answer)

    server, ledger = scripted(well, dark, well), FailureLedger()
    caplog.set_level(logging.WARNING)
    assert training_loop(remote(server.address), FailurePolicy("drop"), ledger, []) == [0.5] * 6
    assert (ledger.failed["red"], ledger.seen["red"]) == (1, 24) and "too dark" in caplog.text

    server, ledger, done = scripted(well, vanish), FailureLedger(), list[float]()
    with pytest.raises(RewardError, match="could not score"):
        training_loop(remote(server.address, retries=0), FailurePolicy("drop"), ledger, done)
    assert done[0] == 0.5 and all(math.isnan(value) for value in done[1:])


def test_a_reward_that_fails_there_fails_here(serve: Serve) -> None:
    ledger = FailureLedger()
    reward = remote(serve({"picky": Picky()}).address + "/picky")
    output = guarded(reward, [flat(20), flat(3)], "x", policy=FailurePolicy("drop"), ledger=ledger)
    assert output.valid.tolist() == [True, False] and output.rewards[0] == 20
    assert ledger.messages["picky"] == {"RuntimeError: 3 is too dark": 1}
