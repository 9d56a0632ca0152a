"""Loading from the hub and uploading to it, with the real client: an offline cache, and a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

import saelens_matryoshka as sm
from saelens_matryoshka.formats import FormatError, build, converter
from saelens_matryoshka.formats.export import import_models
from saelens_matryoshka.formats.registry import FORMATS
from tests.formats.coders import WIDTHS, expected_output, inputs, random_coder
from tests.formats.hub_cache import hub_cache, lay_out  # noqa: F401
from tests.formats.hub_server import serve


def _circuit_tracer_set(folder: Path, n_layers: int = 2) -> None:
    save = FORMATS["circuit-tracer"].save
    folder.mkdir()
    save([random_coder(layer=layer) for layer in range(n_layers)], folder)


def test_from_pretrained_reads_a_set_of_the_hub_without_further_files(
    tmp_path: Path,
    hub_cache: Path,  # noqa: F811
) -> None:
    _circuit_tracer_set(tmp_path / "set")
    lay_out(hub_cache, "mwhanna/some-transcoders", tmp_path / "set")
    for item in ("layer_1.safetensors", "layer_1", "1"):
        sae = SAE.from_pretrained("mwhanna/some-transcoders", item, converter=converter("circuit-tracer"))
        x = inputs()
        torch.testing.assert_close(sae(x), expected_output(random_coder(layer=1), x))
        assert sm.matryoshka_widths(sae) == WIDTHS


def test_a_file_of_a_cached_snapshot_is_read_by_its_path(tmp_path: Path, hub_cache: Path) -> None:  # noqa: F811
    """It is a link to a blob whose name says nothing of its layer."""
    _circuit_tracer_set(tmp_path / "set")
    snapshot = lay_out(hub_cache, "a/set", tmp_path / "set")
    sae = SAE.load_from_disk(snapshot / "layer_1.safetensors", converter=converter("circuit-tracer"))
    assert sae.cfg.metadata.hook_name == "blocks.1.ln2.hook_normalized"
    assert len(import_models(str(snapshot), "circuit-tracer", tmp_path / "out")) == 2


def test_a_set_may_list_files_of_other_repositories(tmp_path: Path, hub_cache: Path) -> None:  # noqa: F811
    _circuit_tracer_set(tmp_path / "files")
    lay_out(hub_cache, "a/files", tmp_path / "files")
    (tmp_path / "set").mkdir()
    config = (tmp_path / "files" / "config.yaml").read_text()
    listed = "transcoders:\n" + "".join(f"- hf://a/files/layer_{layer}.safetensors\n" for layer in (1, 0))
    (tmp_path / "set" / "config.yaml").write_text(config + listed)
    lay_out(hub_cache, "b/set", tmp_path / "set")
    models = import_models("b/set", "circuit-tracer", tmp_path / "out")
    assert [model.name for model in models] == ["layer_0", "layer_1"]
    x = inputs()
    first = SAE.load_from_disk(tmp_path / "out" / "layer_0")
    # the note of the file itself does not overrule the set that names it
    torch.testing.assert_close(first(x), expected_output(random_coder(layer=1), x))
    assert first.cfg.metadata.hook_name == "blocks.0.ln2.hook_normalized"


def test_a_set_without_config_needs_its_hooks(tmp_path: Path, hub_cache: Path) -> None:  # noqa: F811
    _circuit_tracer_set(tmp_path / "set")
    (tmp_path / "set" / "config.yaml").unlink()
    from safetensors.torch import load_file, save_file

    path = tmp_path / "set" / "layer_1.safetensors"
    save_file(load_file(path), path)  # without our note
    lay_out(hub_cache, "a/bare", tmp_path / "set")
    with pytest.raises(FormatError, match="nothing tells which hook it reads"):
        SAE.from_pretrained("a/bare", "layer_1", converter=converter("circuit-tracer"))
    given = converter(
        "circuit-tracer", hook_name="blocks.{layer}.mlp.hook_in", hook_name_out="blocks.{layer}.hook_mlp_out"
    )
    sae = SAE.from_pretrained("a/bare", "layer_1", converter=given)
    assert sae.cfg.metadata.hook_name == "blocks.1.mlp.hook_in"
    assert sae.cfg.architecture() == "jumprelu_transcoder"


def test_the_widths_of_a_release_of_saelens_can_be_given(tmp_path: Path, hub_cache: Path) -> None:  # noqa: F811
    """Its configs are of before SAELens 6 and say nothing of widths."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from safetensors.torch import save_file

    release = "gemma-2-2b-res-matryoshka-dc"
    entry = get_pretrained_saes_directory()[release]
    sae_id, folder_name = next(iter(entry.saes_map.items()))
    coder = random_coder(transcoder=False)
    folder = tmp_path / "repo" / folder_name
    folder.mkdir(parents=True)
    state = {name: getattr(coder, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    save_file(state, folder / "sae_weights.safetensors")
    old = {
        "architecture": "jumprelu",
        "d_in": 16,
        "d_sae": 48,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
    }
    old |= {"hook_name": "blocks.0.hook_resid_post", "model_name": "gemma-2-2b", "context_size": 64}
    (folder / "cfg.json").write_text(json.dumps(old | {"normalize_activations": "none"}))
    lay_out(hub_cache, entry.repo_id, tmp_path / "repo")

    stock = SAE.from_pretrained(release, sae_id)
    assert sm.matryoshka_widths(stock) == [48]
    sae = SAE.from_pretrained(release, sae_id, converter=converter("saelens", widths=[8, 16, 24]))
    assert sm.matryoshka_widths(sae) == WIDTHS
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    assert sae.cfg.metadata.model_name == "gemma-2-2b"
    assert sm.truncate(sae, 8).cfg.d_sae == 8
    x = inputs()
    assert torch.equal(sae(x), stock(x))
    with pytest.raises(FormatError, match="fits d_sae=48 in neither reading"):
        SAE.from_pretrained(release, sae_id, converter=converter("saelens", widths=[8, 17]))


def test_a_repository_that_is_not_in_the_cache_is_said_so(hub_cache: Path, tmp_path: Path) -> None:  # noqa: F811
    assert list(hub_cache.iterdir()) == []
    with pytest.raises(OSError, match="nobody/nothing|offline|cache"):
        import_models("nobody/nothing", "sparsify", tmp_path / "out")
    assert not (tmp_path / "out").exists()


COMMANDS = """
import json, sys
from pathlib import Path
from tests.forked import run_command

for arguments in map(json.loads, sys.stdin):
    done = run_command(*arguments, cwd=Path.cwd())
    print(json.dumps([done.returncode, done.stdout, done.stderr]))
"""


def _run(*commands: list[str], hub_url: str, folder: Path) -> list[tuple[int, str, str]]:
    """The commands one after the other: their exit codes, and what they print.

    In an environment that the hub's client reads as it is imported.
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_of_the_test",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
        "COLUMNS": "80",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS],
        cwd=folder,
        env=environment,
        input="\n".join(map(json.dumps, commands)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_what_is_uploaded_is_downloaded_again(tmp_path: Path) -> None:
    for layer in range(2):
        build(random_coder(layer=layer)).save_model(tmp_path / "stock" / f"layer_{layer}")
    to = ["--to", "circuit-tracer", "--out", "out", "--width", "8", "--width", "48"]
    exported = ["export", "stock", *to, "--upload", "me/graphs", "--private"]
    back = ["import", "me/graphs/width_48", "--from", "circuit-tracer", "--out", "back"]
    missing = ["import", "me/other", "--from", "circuit-tracer", "--out", "x"]
    with serve() as hub:
        done = _run(exported, back, missing, hub_url=hub.url, folder=tmp_path)
        assert [code for code, *_ in done] == [0, 0, 1], done
        assert f"{hub.url}/me/graphs/commit/" in done[0][1].replace("\n", "")
        assert (hub.repo_id, hub.private) == ("me/graphs", True)
        assert len(hub.commits) == 1, "a reader may see half of it"
        assert "Bearer hf_of_the_test" in hub.tokens
        written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert written == set(hub.files)
        card = hub.files["README.md"].decode()
        assert 'from_pretrained("tiny", "me/graphs/width_48")' in card
        assert "Traceback" not in done[2][2]
    x = inputs()
    for layer in range(2):
        sae = SAE.load_from_disk(tmp_path / "back" / f"layer_{layer}")
        torch.testing.assert_close(sae(x), expected_output(random_coder(layer=layer), x))
