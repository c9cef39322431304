"""Weights in and out: .bin, Hugging Face folders, GGUF. transformers and gguf are the oracles, where installed."""
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer

from dev.data import download
from dev.data.vocabulary import VOCABULARY, get_encoder
from dev.eval import convert_bin, export_gguf, export_hf, import_hf
from dev.eval.convert_bin import Checkpoint
from dev.run import checkpoints, hf
from dev.run import vocabulary as vocabularies
from dev.run.files import as_float32, from_float32
from train_gpt2 import GPT2, GPT2Config, init_random

ROOT = Path(__file__).resolve().parents[2]
TIKTOKEN_CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"
MISSING = "not installed: pip install -r dev/requirements.txt"
LIMIT = 2e-4  # of a logit


@pytest.fixture
def vocabulary(monkeypatch):
    if not TIKTOKEN_CACHE.is_dir():
        pytest.skip("no ../shared/data beside the project, where GPT-2's vocabulary is")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))


@pytest.fixture
def transformers():
    pytest.importorskip("torch", reason=MISSING)
    return pytest.importorskip("transformers", reason=MISSING)


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason=MISSING)


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny model as a Hugging Face folder"""
    export_hf.export(Checkpoint(tiny), tmp_path / "hf", "fp32")
    return tmp_path / "hf"


def write_model(path, *sizes):
    """A .bin whose every tensor, biases included, has its own random numbers"""
    model, rng = GPT2(GPT2Config(*sizes)), np.random.default_rng(1)
    params = model.host("params")
    init_random(model.config, params)
    for name, _ in model.table:
        x = getattr(params, name)
        x = x[:model.config.vocab_size] if name == "wte" else x
        x += rng.normal(0, 0.1, x.shape).astype(np.float32)
    checkpoints.write_model(path, model)
    return path


def our_logits(path, tokens):
    model = GPT2.build(str(path))
    model.forward(tokens)
    return np.array([model.logits(row).copy() for row in range(tokens.size)]).reshape(*tokens.shape, -1)


def their_logits(model, tokens):
    import torch
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long())[0]
        return (logits if logits.shape[-1] == model.config.vocab_size else logits @ model.wte.weight.T).float().numpy()


def read_raw(path):
    """{name: (dtype, shape, bytes)} of a safetensors file, read without import_hf"""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], content[start + t["data_offsets"][0]:start + t["data_offsets"][1]])
            for name, t in header.items()}


def write_raw(path, tensors):
    header, body = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def edit_weights(folder, change):
    tensors = read_raw(folder / "model.safetensors")
    write_raw(folder / "model.safetensors", change(tensors) or tensors)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "none of it"}))


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16

def test_bfloat16_is_the_nearest_and_the_even_one_of_two(rng):
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # half-way between two
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    below = x.view(np.uint32) >> 16  # towards zero
    low, high = ((b.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for b in (below, below + 1))
    high[np.isinf(high)] = np.copysign(2.0**128, high[np.isinf(high)])
    up = (abs(high - x) < abs(x - low)) | (abs(high - x) == abs(x - low)) & (below % 2 == 1)
    assert (from_float32(x, "bf16") == below + up).all()


def test_bfloat16_keeps_what_is_not_a_number():
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 3.4e38], np.float32)
    x[0:1].view(np.uint32)[0] = 0x7F800001  # a NaN whose upper half alone would be infinity
    assert np.isnan(as_float32(from_float32(x, "bf16"))[0])
    assert as_float32(from_float32(x, "bf16"))[1:].tolist() == [np.inf, -np.inf, 0.0, np.inf]


def test_convert_bin_writes_what_pytorch_writes(tiny, tmp_path, python):
    """gpt2_tiny_bf16.bin is the reference's, rounded by PyTorch."""
    back, narrow = tmp_path / "back.bin", tmp_path / "narrow.bin"
    reference = tiny.replace(".bin", "_bf16.bin")
    again = tmp_path / "again.bin"
    for source, path, dtype in (tiny, narrow, "bf16"), (reference, back, "fp32"), (back, again, "bf16"):
        process = python("-m", "dev.eval.convert_bin", "-i", source, "-o", path, "-d", dtype)
        assert process.communicate()[1] == "" and process.returncode == 0
    assert narrow.read_bytes() == again.read_bytes() == Path(reference).read_bytes()
    assert back.stat().st_size == Path(tiny).stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

@pytest.mark.parametrize("sizes", [None, (9, 128, 128, 1, 1, 8), (8, 130, 256, 3, 5, 10)])
def test_round_trip_is_byte_identical(sizes, tiny, tmp_path):
    """Also where V = Vp, for which llm.c's export writes an empty embedding."""
    path = write_model(tmp_path / "model.bin", *sizes) if sizes else Path(tiny)
    export_hf.export(Checkpoint(path), tmp_path / "hf", "fp32")
    hf.import_model(tmp_path / "hf", tmp_path / "back.bin", "fp32")
    assert (tmp_path / "back.bin").read_bytes() == path.read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_bfloat16_round_trip_is_byte_identical(tiny, tmp_path):
    path = tiny.replace(".bin", "_bf16.bin")
    export_hf.export(Checkpoint(path), tmp_path / "hf", "bf16")
    assert {dtype for dtype, _, _ in read_raw(tmp_path / "hf" / "model.safetensors").values()} == {"BF16"}
    hf.import_model(tmp_path / "hf", tmp_path / "back.bin", "bf16")
    assert (tmp_path / "back.bin").read_bytes() == Path(path).read_bytes()


def test_transformers_computes_our_logits(tiny, folder, transformers, rng):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "GPT2LMHeadModel" and model.lm_head.weight is model.transformer.wte.weight
    tokens = rng.integers(0, 300, (2, 64), dtype=np.int32)
    ours = our_logits(tiny, tokens)
    assert abs(ours).max() > 100 * LIMIT
    assert abs(their_logits(model, tokens) - ours).max() < LIMIT


@pytest.mark.parametrize(("kind", "dtype", "shard_size"), [
    ("GPT2LMHeadModel", "float32", "5GB"), ("GPT2LMHeadModel", "float16", "5GB"),
    ("GPT2LMHeadModel", "bfloat16", "30KB"), ("GPT2LMHeadModel", "float32", "30KB"), ("GPT2Model", "float32", "5GB"),
])  # fmt: skip
def test_what_transformers_writes_is_read(kind, dtype, shard_size, transformers, tmp_path, rng):
    import torch
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.GPT2Config(
        vocab_size=70, n_positions=12, n_embd=24, n_layer=2, n_head=3, initializer_range=0.2))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard_size == "30KB")
    hf.import_model(tmp_path / "hf", tmp_path / "model.bin", "fp32")
    tokens = rng.integers(0, 70, (3, 12), dtype=np.int32)
    assert abs(their_logits(model.float().eval(), tokens) - our_logits(tmp_path / "model.bin", tokens)).max() < LIMIT


def test_tokenizer_of_the_folder_is_gpt2s(tmp_path, vocabulary, transformers):
    path = write_model(tmp_path / "model.bin", 8, 50257, 50304, 1, 1, 8)
    export_hf.export(Checkpoint(path), tmp_path / "hf", "bf16")
    for name, original in ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"):
        sha256 = hashlib.sha256((tmp_path / "hf" / name).read_bytes()).hexdigest()
        assert sha256 == VOCABULARY[original]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), get_encoder()
    for text in "Hello world, it's  naïve\n\n日本 don 't .", " \t x<|endoftext|>1234567":
        ids = ours.encode(text, allowed_special="all")
        assert theirs(text).input_ids == ids and theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert len(theirs) == 50257 and theirs.model_max_length == 8


def test_old_and_bare_folders_are_read(tiny, folder, tmp_path):
    """No prefix, causal masks among the weights, a copy of the embedding for the head, n_ctx instead of n_positions"""
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {"h.0.attn.bias": ("BOOL", [1, 1, 2, 2], bytes(4)), "h.1.attn.masked_bias": ("F32", [], bytes(4))}
        return {**bare, **masks, "lm_head.weight": bare["wte.weight"]}
    edit_weights(folder, change)
    edit_config(folder, n_positions="none of it", n_inner=128, activation_function="gelu_pytorch_tanh")
    hf.import_model(folder, tmp_path / "back.bin", "fp32")
    assert (tmp_path / "back.bin").read_bytes() == Path(tiny).read_bytes()


def transposed(tensors):
    dtype, shape, content = tensors["transformer.h.0.mlp.c_fc.weight"]
    tensors["transformer.h.0.mlp.c_fc.weight"] = dtype, shape[::-1], content


def other_head(tensors):
    dtype, shape, content = tensors["transformer.wte.weight"]
    tensors["lm_head.weight"] = dtype, shape, bytes(len(content))


def cut(count):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:count])
    return cut


def write_index(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(("damage", "message"), [
    (cut(-1), "truncated"), (cut(100), "truncated"), (cut(5), "truncated"), (cut(0), "truncated"),
    (lambda f: (f / "model.safetensors").write_bytes(b"PK" + bytes(1000)), "no safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in .*HINT: .*save_pretrained"),
    (lambda f: write_index(f, '{"weight_map": {"wte.weight": "absent.safetensors"}}'), "no absent.safetensors"),
    (lambda f: write_index(f, '{"weight_map": {"wte.weight": "../secret"}}'), "has no weight_map"),
    (lambda f: write_index(f, "[1"), "index.json: not JSON"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("<html>"), "config.json: not JSON"),
    (lambda f: edit_weights(f, lambda t: t.pop("transformer.h.1.ln_2.bias") and t), "no tensor h.1.ln_2.bias"),
    (lambda f: edit_weights(f, lambda t: {**t, "transformer.ln_f.bias": ("I32", [32], bytes(128))}), "no tensor ln_f"),
    (lambda f: edit_weights(f, transposed), "c_fc.weight has the shape .128, 32., by config.json it is .32, 128."),
    (lambda f: edit_weights(f, other_head), "lm_head.weight is not wte.weight"),
    (lambda f: edit_config(f, n_layer=1), "12 tensors that no GPT-2 of 1 layers has"),
    (lambda f: edit_config(f, n_embd="32"), "make no sense"),
    (lambda f: edit_config(f, n_head=3), "make no sense"),
    (lambda f: edit_config(f, n_inner=64), "n_inner is 64"),
    (lambda f: edit_config(f, model_type="llama"), "model_type is 'llama', expected 'gpt2'"),
    (lambda f: edit_config(f, model_type="none of it"), "model_type is None"),
    (lambda f: edit_config(f, activation_function="relu"), "activation_function is 'relu'"),
    (lambda f: edit_config(f, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    (lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (lambda f: edit_config(f, tie_word_embeddings=False), "tie_word_embeddings"),
])  # fmt: skip
def test_what_is_no_whole_gpt2_is_refused(damage, message, folder, tmp_path):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        hf.import_model(folder, tmp_path / "model.bin", "fp32")
    assert not list(tmp_path.glob("*.bin*"))


@pytest.mark.parametrize("script", ["import_hf", "export_hf", "export_gguf", "convert_bin"])
def test_errors_are_one_line_and_a_hint(script, folder, tmp_path, python):
    if script == "export_gguf":
        pytest.importorskip("gguf", reason=MISSING)
    cut(1000)(folder)
    path = tmp_path / "cut.bin"
    path.write_bytes((ROOT / "dev/test/gpt2_tiny.bin").read_bytes()[:-4])
    flags = ["-d", "bf16"] if script == "convert_bin" else []
    process = python("-m", f"dev.eval.{script}", "-i", folder if script == "import_hf" else path,
                     "-o", tmp_path / "result", *flags)
    error = process.communicate()[1]
    assert process.returncode == 1 and error.startswith("error: ") and "---> HINT: " in error
    assert "truncated" in error and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.bin", "hf"]


# ---------------------------------------------------------------------------------------------------------------------
# the hub, played by a web server on this machine

@pytest.fixture
def hub(monkeypatch, folder):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with FlakyServer() as server:
        for module in download, import_hf:
            monkeypatch.setattr(module, "HF", server.url)
        server.base = "/openai-community/gpt2/resolve/main/"
        server.files = {server.base + p.name: p.read_bytes() for p in folder.iterdir()}
        yield server


def fetch_and_import(monkeypatch, tmp_path, model):
    path = tmp_path / "model.bin"
    flags = ["-i", model, "-o", path, "--data_dir", tmp_path / "data"]
    monkeypatch.setattr("sys.argv", ["import_hf.py", *map(str, flags)])
    import_hf.main()
    return path.read_bytes()


def test_model_comes_from_the_hub_and_the_download_is_resumed(hub, monkeypatch, tmp_path, tiny):
    name = hub.base + "model.safetensors"
    hub.faults[name] = ["503", "truncate"]
    assert fetch_and_import(monkeypatch, tmp_path, "gpt2") == Path(tiny).read_bytes()
    assert hub.requests[-1][0] == name and int(hub.requests[-1][1].strip("bytes=-")) > 0
    assert all(headers["Authorization"] == "Bearer secret" for headers in hub.headers)
    count = len(hub.requests)
    assert fetch_and_import(monkeypatch, tmp_path, "gpt2") == Path(tiny).read_bytes()
    assert set(hub.methods[count:]) == {"HEAD"}  # it was there already, and has not changed


def test_model_that_has_changed_on_the_hub(hub, monkeypatch, tmp_path, tiny, capsys):
    """It is fetched again, whole or not at all; where the hub cannot be asked, what is here is taken."""
    name = hub.base + "model.safetensors"
    fetch_and_import(monkeypatch, tmp_path, "gpt2")
    hub.files[name], hub.etag = hub.files[name][:-4] + np.float32(0.5).tobytes(), '"2"'
    hub.faults[name] = ["", "404"]
    with pytest.raises(ValueError, match="no model.safetensors"):
        fetch_and_import(monkeypatch, tmp_path, "gpt2")
    old = tmp_path / "data/hf/openai-community--gpt2/model.safetensors"
    assert old.read_bytes() != hub.files[name] and old.stat().st_size == len(hub.files[name])
    capsys.readouterr()
    changed = fetch_and_import(monkeypatch, tmp_path, "gpt2")
    assert "model.safetensors has changed on the hub" in capsys.readouterr().out
    assert changed != Path(tiny).read_bytes() and old.read_bytes() == hub.files[name]
    monkeypatch.setattr(import_hf, "HF", "http://127.0.0.1:9")
    assert fetch_and_import(monkeypatch, tmp_path, "gpt2") == changed
    assert "does not say whether it has changed" in capsys.readouterr().out


@pytest.mark.parametrize("model, base", [
    ("gpt2@v1.0", "/openai-community/gpt2/resolve/v1.0/"), ("a/b@refs/pr/1", "/a/b/resolve/refs%2Fpr%2F1/"),
    ("a/b@607a30d783dfa663caf39e06633721c8d4cfcd7e", "/a/b/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/")])
def test_revision_of_a_model(model, base, hub, monkeypatch, tmp_path, tiny):
    """Beside the newest version, which stays what it is"""
    main = dict(hub.files)
    with pytest.raises(ValueError, match="has no config.json\n---> HINT: .*revision"):
        fetch_and_import(monkeypatch, tmp_path, model)
    hub.files = {base + name.rpartition("/")[2]: content for name, content in main.items()}
    assert fetch_and_import(monkeypatch, tmp_path, model) == Path(tiny).read_bytes()
    assert {path.rpartition("/")[0] + "/" for path, _ in hub.requests} == {base}
    hub.files = main
    assert fetch_and_import(monkeypatch, tmp_path, "gpt2") == Path(tiny).read_bytes()
    assert len(list((tmp_path / "data/hf").iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------------------
# a vocabulary of its own

OWN_TEXT = "Hällo wörld, it's  naïve\n\n日本 don't .<|endoftext|> \t1234567 ll 'll the theme"


@pytest.fixture
def own(tmp_path):
    """own(kind): the folder of a model whose vocabulary is its own, and the tokenizer that wrote it"""
    tokenizers = pytest.importorskip("tokenizers", reason=MISSING)

    def own(kind="tokenizer.json"):
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        text = [" ".join(f"the theme {i} don't wörld 日本" for i in range(300))]
        tokenizer.train_from_iterator(text, 400, special_tokens=["<pad>", "<|endoftext|>"], show_progress=False)
        V = tokenizer.get_vocab_size()
        path = write_model(tmp_path / "first.bin", 64, V, (V + 127) // 128 * 128, 1, 1, 32)
        export_hf.export(Checkpoint(path), tmp_path / "own", "fp32")
        edit_config(tmp_path / "own", bos_token_id=1, eos_token_id=1)
        if kind == "tokenizer.json":
            tokenizer.save(str(tmp_path / "own" / kind))
        else:
            tokenizer.save_model(str(tmp_path / "own"))
        return tmp_path / "own", tokenizer
    return own


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_own_vocabulary_goes_in_and_out(own, kind, tmp_path, python, transformers):
    folder, theirs = own(kind)
    hf.import_model(folder, tmp_path / "own.bin", "fp32")
    ours = vocabularies.own_vocabulary(str(tmp_path / "own.bin"))
    for text in OWN_TEXT.split("<|endoftext|>"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert b"".join(ours.tokens[i] for i in ours.encode(text)).decode() == text
    assert ours.eot_token == 1 and ours.encode("the<|endoftext|> the")[1] == 1
    run = python("-m", "dev.generate", "-e", tmp_path / "own.bin", "-p", "the wörld", "-n", "5", "--temperature", "0")
    out, err = run.communicate()
    assert run.returncode == 0 and out.startswith("the wörld"), err
    export_hf.export(Checkpoint(tmp_path / "own.bin"), tmp_path / "out", "fp32")
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} & {p.name for p in folder.iterdir()}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 1)
    if kind == "vocab.json":
        again = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "out")
        assert again("the wörld").input_ids == ours.encode("the wörld")


def test_own_vocabulary_goes_into_gguf(own, tmp_path, gguf):
    folder, theirs = own()
    hf.import_model(folder, tmp_path / "own.bin", "fp32")
    export_gguf.export(Checkpoint(tmp_path / "own.bin"), tmp_path / "own.gguf", "f32")
    fields = read_gguf(gguf, tmp_path / "own.gguf")[0]
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens == [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    assert fields["tokenizer.ggml.token_type"][:3] == [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL]
    assert all(first + second in tokens for first, second in map(str.split, fields["tokenizer.ggml.merges"]))
    assert fields["tokenizer.ggml.eos_token_id"] == 1


def test_own_vocabulary_goes_along(own, tmp_path, monkeypatch, tiny):
    """Into a converted checkpoint; and away, where another model is imported under the same name."""
    hf.import_model(own()[0], tmp_path / "own.bin", "fp32")
    flags = ["-i", tmp_path / "own.bin", "-o", tmp_path / "narrow.bin", "-d", "bf16"]
    monkeypatch.setattr("sys.argv", ["convert_bin.py", *map(str, flags)])
    convert_bin.main()
    assert vocabularies.own_vocabulary(str(tmp_path / "narrow.bin")).tokens
    export_hf.export(Checkpoint(tiny), tmp_path / "plain", "fp32")
    hf.import_model(tmp_path / "plain", tmp_path / "own.bin", "fp32")
    assert not (tmp_path / "own.tokenizer").exists()


@pytest.mark.parametrize("damage, problem", [
    (lambda t: t["model"].update(type="Unigram"), "Unigram"), (lambda t: t.update(pre_tokenizer=None), "None"),
    (lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"), (lambda t: t.pop("model"), "not of|no vocab"),
    (lambda t: t["model"].update(vocab=[["a", 1]]), "no vocabulary")])
def test_a_vocabulary_of_another_kind(own, tmp_path, damage, problem, python, capsys):
    """It is kept and exported; that it cannot be used here is one clear line."""
    folder, _ = own()
    whole = json.loads((folder / "tokenizer.json").read_text())
    damage(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    hf.import_model(folder, tmp_path / "own.bin", "fp32")
    assert re.search(f"note: .*only its token numbers: .*({problem})", capsys.readouterr().out)
    run = python("-m", "dev.generate", "-e", tmp_path / "own.bin", "-n", "3", "--past_end")
    out, err = run.communicate()
    assert run.returncode == 0 and re.search(r"^\d+ \d+ \d+", out) and "as token numbers: " in err
    run = python("-m", "dev.generate", "-e", tmp_path / "own.bin", "-p", "text")
    assert "error: a prompt cannot be made into tokens" in run.communicate()[1] and run.returncode == 1
    export_hf.export(Checkpoint(tmp_path / "own.bin"), tmp_path / "out", "fp32")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_gpt2s_vocabulary_is_not_kept(tmp_path, vocabulary):
    path = write_model(tmp_path / "model.bin", 8, 50257, 50304, 1, 1, 8)
    export_hf.export(Checkpoint(path), tmp_path / "hf", "bf16")
    hf.import_model(tmp_path / "hf", tmp_path / "back.bin", "bf16")
    assert not (tmp_path / "back.tokenizer").exists()
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\n")
    hf.import_model(tmp_path / "hf", tmp_path / "back.bin", "bf16")
    assert len(vocabularies.own_vocabulary(str(tmp_path / "back.bin")).encode("abc")) == 3


def test_sharded_model_comes_from_the_hub(hub, monkeypatch, tmp_path, folder, tiny):
    tensors = read_raw(folder / "model.safetensors")
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        write_raw(tmp_path / file, {name: tensor for name, tensor in tensors.items() if where[name] == file})
        hub.files[hub.base + file] = (tmp_path / file).read_bytes()
    del hub.files[hub.base + "model.safetensors"]
    with pytest.raises(ValueError, match="no model.safetensors\n---> HINT"):
        fetch_and_import(monkeypatch, tmp_path, "gpt2")
    hub.files[hub.base + "model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    assert fetch_and_import(monkeypatch, tmp_path, "openai-community/gpt2") == Path(tiny).read_bytes()


@pytest.mark.parametrize(("model", "message"), [
    ("nobody/nothing", "has no config.json"), ("a/b/c", "no such folder"), ("../elsewhere", "no such folder"),
])  # fmt: skip
def test_unknown_model(model, message, hub, monkeypatch, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fetch_and_import(monkeypatch, tmp_path, model)
    assert not (tmp_path / "model.bin").exists()


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

LLAMA_CPP = {  # llama.cpp's names for our tensors
    "wte": "token_embd.weight", "wpe": "position_embd.weight", "lnfw": "output_norm.weight", "lnfb": "output_norm.bias",
    "ln1w": "blk.{}.attn_norm.weight", "ln1b": "blk.{}.attn_norm.bias",
    "qkvw": "blk.{}.attn_qkv.weight", "qkvb": "blk.{}.attn_qkv.bias",
    "attprojw": "blk.{}.attn_output.weight", "attprojb": "blk.{}.attn_output.bias",
    "ln2w": "blk.{}.ffn_norm.weight", "ln2b": "blk.{}.ffn_norm.bias",
    "fcw": "blk.{}.ffn_up.weight", "fcb": "blk.{}.ffn_up.bias",
    "fcprojw": "blk.{}.ffn_down.weight", "fcprojb": "blk.{}.ffn_down.bias",
}  # fmt: skip


def read_gguf(gguf, path):
    """({key: value}, {name: GGML type}, {name: float32 array}); a tensor's dimensions are listed innermost first"""
    reader = gguf.GGUFReader(path)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert all(tensors[t.name].shape == tuple(map(int, t.shape[::-1])) for t in reader.tensors)
    return {key: field.contents() for key, field in reader.fields.items()}, types, tensors


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_gguf_holds_the_same_tensors(dtype, tiny, tmp_path, gguf):
    path = tmp_path / "new" / "model.gguf"
    export_gguf.export(Checkpoint(tiny), path, dtype)
    fields, types, tensors = read_gguf(gguf, path)
    params, expected = Checkpoint(tiny).params, {}
    for name, theirs in LLAMA_CPP.items():
        x = np.array(getattr(params, name))
        layers = {theirs.format(layer): (name, x[layer]) for layer in range(2)}
        expected.update(layers if "{}" in theirs else {theirs: (name, x)})
    assert tensors.keys() == expected.keys() | {"output.weight"}
    np.testing.assert_array_equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert types["output.weight"] == types["token_embd.weight"]
    for theirs, (name, x) in expected.items():
        x = x[:300] if name == "wte" else x
        matrix = theirs.endswith("weight") and "norm" not in theirs and name != "wpe"
        assert types[theirs] == (dtype.upper() if matrix else "F32"), theirs
        if types[theirs] == "Q8_0":  # 32 numbers in a row share a scale, their largest magnitude / 127, kept as float16
            largest = np.repeat(abs(x).reshape(*x.shape[:-1], -1, 32).max(-1), 32, -1)
            assert (abs(tensors[theirs] - x) <= largest * (0.5 / 127 + 2**-11) + 1e-7).all(), theirs
            assert tensors[theirs].std() > 0
        else:
            np.testing.assert_array_equal(tensors[theirs], x.astype(types[theirs].replace("F", "float")), theirs)
    assert fields["general.architecture"] == "gpt2" and fields["tokenizer.ggml.model"] == "no_vocab"
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 128,
             "attention.head_count": 2, "vocab_size": 300}
    assert {key: fields["gpt2." + key] for key in sizes} == sizes
    assert math.isclose(fields["gpt2.attention.layer_norm_epsilon"], 1e-5, rel_tol=1e-6)
    file_types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
                  "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    assert fields["general.file_type"] == file_types[dtype]


def test_gguf_rows_that_are_no_multiple_of_32_become_f16(tmp_path, gguf):
    path = write_model(tmp_path / "model.bin", 8, 130, 256, 1, 2, 48)
    export_gguf.export(Checkpoint(path), tmp_path / "model.gguf", "q8_0")
    types = read_gguf(gguf, tmp_path / "model.gguf")[1]
    assert types["blk.0.attn_qkv.weight"] == "F16" and types["blk.0.ffn_down.weight"] == "Q8_0"


def test_gguf_has_gpt2s_tokenizer(tmp_path, gguf, vocabulary):
    """Here of a model with more tokens than GPT-2 has: V = Vp"""
    V = 50304
    path = write_model(tmp_path / "model.bin", 8, V, V, 1, 1, 32)
    export_gguf.export(Checkpoint(path), tmp_path / "model.gguf", "q8_0")
    fields, _, tensors = read_gguf(gguf, tmp_path / "model.gguf")
    assert tensors["token_embd.weight"].shape == (V, 32)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == V
    assert [tokens[i] for i in (0, 220, 995, 50256)] == ["!", "Ġ", "Ġworld", "<|endoftext|>"]
    assert types[50256] == gguf.TokenType.CONTROL and set(types[:50256]) == {gguf.TokenType.NORMAL}
    assert set(types[50257:]) == {gguf.TokenType.UNUSED}
    merges = fields["tokenizer.ggml.merges"]
    assert len(merges) == 50000 and merges[0] == "Ġ t" and merges[-1] == "Ġg azed"
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.bos_token_id"] == 50256


@pytest.mark.parametrize("flags, has", [([], True), (["--tied", "0"], True), (["--tied", "1"], False)])
def test_gguf_with_and_without_an_output_matrix(flags, has, tiny, tmp_path, gguf, monkeypatch):
    """llama.cpp reads one without since March 2025 only"""
    path = tmp_path / "model.gguf"
    monkeypatch.setattr("sys.argv", ["export_gguf.py", "-i", tiny, "-o", str(path), "-d", "q8_0", *flags])
    export_gguf.main()
    types = read_gguf(gguf, path)[1]
    assert ("output.weight" in types) == has and types.get("output.weight", "Q8_0") == "Q8_0"


def test_gguf_of_bfloat16_weights(tiny, tmp_path, gguf):
    path = tiny.replace(".bin", "_bf16.bin")
    export_gguf.export(Checkpoint(path), tmp_path / "model.gguf", "f32")
    tensors = read_gguf(gguf, tmp_path / "model.gguf")[2]
    assert (tensors["blk.1.ffn_down.weight"] == as_float32(np.array(Checkpoint(path).params.fcprojw[1]))).all()

