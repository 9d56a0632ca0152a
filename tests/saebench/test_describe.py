"""Descriptions of latents whose meaning is known, by a chat model that answers by rule."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from transformer_lens import HookedTransformer

from saelens_matryoshka import saebench
from saelens_matryoshka.cli import main
from saelens_matryoshka.files.locks import alone_at
from saelens_matryoshka.saebench import Endpoint, EndpointError, Prices
from tests.saebench.chat_server import ChatServer, chat_server
from tests.saebench.dictionaries import CLASS_WORDS, FILLERS, dictionary

Describe = Callable[..., saebench.Descriptions]

pytestmark = pytest.mark.usefixtures("sae_bench")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with chat_server() as running:
        yield running


@pytest.fixture(scope="module")
def text() -> Dataset:
    """Filler words, now and then a word that one of the latents detects."""
    rng = random.Random(0)
    words = [*FILLERS] * 12 + [*CLASS_WORDS]
    return Dataset.from_list([{"text": "".join(rng.choices(words, k=400))} for _ in range(40)])


@pytest.fixture(scope="module")
def detectors(tiny_model: HookedTransformer, text: Dataset) -> SAE[Any]:
    """Latents 0 to 2 fire on one word each, more or less strongly; levels of 2 and 12 latents."""
    hook_name = "blocks.1.hook_resid_post"
    tokens = tiny_model.to_tokens(text["text"][:10])
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens, names_filter=hook_name)
    residual = cache[hook_name][:, 1:]
    W_enc, threshold = torch.zeros(tiny_model.cfg.d_model, 12), torch.full((12,), 1e6)
    for latent, word in enumerate(CLASS_WORDS):
        here = tokens[:, 1:] == tiny_model.to_tokens(word, prepend_bos=False)[0, 0]
        direction = residual[here].mean(dim=0) - residual[~here].mean(dim=0)
        W_enc[:, latent] = direction / direction.norm()
        scores = residual @ W_enc[:, latent]
        assert scores[here].min() > scores[~here].max()
        threshold[latent] = (scores[here].min() + scores[~here].max()) / 2
    W_dec = torch.randn(12, tiny_model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    return dictionary(W_enc, W_dec, threshold, hook_name=hook_name, widths=[2, 12])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "d"


@pytest.fixture
def describe(
    detectors: SAE[Any], tiny_model: HookedTransformer, text: Dataset, server: ChatServer, out: Path
) -> Describe:
    """`saebench.describe` of the detectors, in `out`, with the endpoint and small numbers."""

    def call(folder: Path = out, **given: Any) -> saebench.Descriptions:
        settings = {"endpoint": Endpoint("by-rule", server.url, max_retries=2)}
        settings |= {"n_tokens": 8_000, "context_size": 64, "min_firings": 20, **given}
        return saebench.describe(detectors, tiny_model, text, folder, **settings)

    return call


def test_latents_of_known_meaning_are_described_and_detected(describe: Describe, out: Path) -> None:
    said = describe()
    assert sorted(said.by_latent) == [0, 1, 2]
    for latent, word in enumerate(CLASS_WORDS):
        assert word.strip() in said.by_latent[latent].text
        assert said.by_latent[latent].accuracy == 1
        assert any(said.by_latent[latent].fires)
        assert not all(said.by_latent[latent].fires)
    assert len(said.table().rows) == 2
    read = saebench.Descriptions.open(out, said.settings, [2, 12])
    assert read.by_latent == said.by_latent


def test_a_wrong_description_scores_no_better_than_guessing(
    describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.saebench.chat_server._describe", lambda _: 'activates on the word "xyzzy"')
    said = describe()
    assert all(one.balanced_accuracy == 0.5 for one in said.by_latent.values())
    silent = [1 - sum(one.fires) / len(one.fires) for one in said.by_latent.values()]
    assert [one.accuracy for one in said.by_latent.values()] == pytest.approx(silent)


def test_nothing_is_sent_before_the_estimate_is_approved(
    describe: Describe, out: Path, tiny_model: HookedTransformer, server: ChatServer
) -> None:
    estimates: list[saebench.Estimate] = []

    def refuse(estimate: saebench.Estimate) -> bool:
        estimates.append(estimate)
        return False

    describe(approve=refuse)
    assert not server.answered
    assert not out.exists()
    describe()
    (estimate,) = estimates
    assert estimate.n_requests == len(server.answered) == 6
    sent = sum(
        len(tiny_model.tokenizer("\n".join(m["content"] for m in request["messages"]))["input_ids"])
        for request in server.answered
    )
    assert estimate.prompt_tokens == pytest.approx(sent, rel=0.05)
    assert estimate.cost(Prices(1, 10)) == pytest.approx(
        (estimate.prompt_tokens + 10 * estimate.completion_tokens) / 1e6
    )


def test_an_interrupted_run_goes_on_where_it_stopped(
    describe: Describe, out: Path, server: ChatServer, tmp_path: Path
) -> None:
    whole = describe(tmp_path / "whole")
    server.answered.clear()
    server.fails_after = 2
    with pytest.raises(RuntimeError, match=r"2 of 3 latents got no answer .*500"):
        describe(concurrency=1, endpoint=Endpoint("by-rule", server.url, max_retries=0))
    with (out / "latents.jsonl").open("a") as file:
        file.write('{"latent": 1, "te')  # killed while it wrote
    server.fails_after = None
    resumed = describe()
    assert len(server.answered) == 6
    assert resumed.by_latent == whole.by_latent
    again = describe()
    assert len(server.answered) == 6
    assert again.by_latent == whole.by_latent


def test_a_busy_endpoint_is_asked_again(describe: Describe, server: ChatServer) -> None:
    server.busy_requests = 2
    said = describe(latents=[1], concurrency=1)
    assert list(said.by_latent) == [1]


def test_an_answer_that_is_no_list_is_kept_unscored(
    describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.saebench.chat_server._detect", lambda _: "I would say the first")
    said = describe()
    assert all(one.accuracy is None for one in said.by_latent.values())
    assert "3 answers could not be read" in str(said.table().caption)


NO_ANSWERS = {
    "cut short": (b'{"id": "1", "choi', "is no JSON"),
    "another kind": (b"[]", r"is no chat completion: \[\]"),
    "a gateway's error": (b'{"error": {"message": "overloaded"}}', "is no chat completion.*overloaded"),
    "no choices": (b'{"choices": []}', "is no chat completion"),
    "no text": (
        b'{"choices": [{"finish_reason": "length", "message": {"content": null}}]}',
        r"is empty.*\(finish_reason 'length'\)",
    ),
}


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_what_is_no_answer_is_told_and_asked_for_again(
    case: str, describe: Describe, server: ChatServer
) -> None:
    server.body, message = NO_ANSWERS[case]
    with pytest.raises(
        RuntimeError, match=rf"3 of 3 latents got no answer \(latent .: the answer {message}"
    ) as told:
        describe()
    assert "others" not in str(told.value)
    server.body = None
    assert sorted(describe().by_latent) == [0, 1, 2]


def test_what_is_under_way_at_an_interruption_is_kept(
    describe: Describe, out: Path, server: ChatServer
) -> None:
    def interrupt(n_done: int, n_all: int) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe(on_progress=interrupt)
    kept = (out / "latents.jsonl").read_text().splitlines()
    assert len(kept) == len(server.answered) / 2 == 3


def test_an_interruption_does_not_wait_for_an_answer_that_does_not_come(
    describe: Describe, out: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(n_done: int, n_all: int) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[saebench.describe.__module__], "_GRACE_SECONDS", 0.2)
    server.hangs_after = 2
    before, started = set(threading.enumerate()), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        describe(concurrency=1, on_progress=interrupt)
    assert time.monotonic() - started < Endpoint.timeout / 4
    assert len((out / "latents.jsonl").read_text().splitlines()) == 1
    waiting = [thread for thread in set(threading.enumerate()) - before if "(work)" in thread.name]
    assert waiting
    assert all(thread.daemon for thread in waiting), "or the process would wait for them at its end"


def test_two_at_once_ask_for_nothing_twice(describe: Describe, out: Path, server: ChatServer) -> None:
    with alone_at(out, RuntimeError()), pytest.raises(ValueError, match="d' is in use: another process"):
        describe()
    assert not server.answered

    def another_is_faster(estimate: saebench.Estimate) -> bool:
        assert estimate.n_latents == 3
        return bool(describe(latents=[0]).by_latent)

    said = describe(approve=another_is_faster)
    assert sorted(said.by_latent) == [0, 1, 2]
    assert len(server.answered) == 6
    assert len((out / "latents.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_leaves_the_settings_that_were_there(
    describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(latents=[0])

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            describe()
    assert sorted(describe().by_latent) == [0, 1, 2]


def test_what_the_endpoint_refuses_is_told_at_once(
    describe: Describe, out: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "another"
    with pytest.raises(EndpointError, match="refuses the key in OPENAI_API_KEY"):
        describe()
    server.key = "secret"
    with pytest.raises(EndpointError, match="does not have model 'gpt-x': no model gpt-x"):
        describe(endpoint=Endpoint("gpt-x", server.url))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        describe()
    assert not out.exists()


def test_the_random_state_is_as_before(describe: Describe) -> None:
    before = torch.get_rng_state(), random.getstate()
    describe()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


BAD = {
    "latents": ({"latents": [12]}, r"latents=\[12\]"),
    "min_firings": ({"min_firings": 10**6}, "min_firings=1000000: no latent fires"),
    "n_latents": ({"n_latents": 0}, "n_latents=0"),
    "unknown setting": ({"settings": {"n_randm": 1}}, "settings: n_randm"),
    "impossible setting": ({"settings": {"buffer": "wide"}}, "settings: .*buffer"),
    "short context": ({"context_size": 16}, "context_size=16 is too short"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_anything_is_sent(
    case: str, describe: Describe, out: Path, server: ChatServer
) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        describe(**given)
    assert not server.answered
    assert not out.exists()


def test_descriptions_made_otherwise_are_not_mixed(describe: Describe, out: Path) -> None:
    describe(latents=[0])
    before = (out / "latents.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another seed"):
        describe(seed=1)
    assert (out / "latents.jsonl").read_bytes() == before


def test_the_command_estimates_describes_and_says_where(
    detectors: SAE[Any],
    text: Dataset,
    server: ChatServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "sae"
    detectors.save_model(folder)
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in text))

    def run(*more: str) -> str:
        args = ["describe", folder, "--chat-model", "by-rule", "--base-url", server.url, "--dataset", source]
        args += ["--tokens", 8000, "--context-size", 64, "--min-firings", 20, *more]
        monkeypatch.setattr(sys, "argv", ["saelens-matryoshka", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    said = run("--estimate", "--prices", "1,10")
    assert "3 latents: 6 requests" in said
    assert "USD" in said
    assert not server.answered
    said = run("--yes")
    assert len(server.answered) == 6
    assert "1.000" in said
    rows = [json.loads(line) for line in (folder / "descriptions" / "latents.jsonl").read_text().splitlines()]
    assert {row["latent"] for row in rows} == {0, 1, 2}
