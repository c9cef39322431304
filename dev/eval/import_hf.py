"""
GPT-2's weights from Hugging Face, or any model of that kind, into a checkpoint (.bin) for train_gpt2.py.

    python -m dev.eval.import_hf -i gpt2 -o data/gpt2_124M.bin                         # gpt2-medium, -large, -xl
    python -m dev.eval.import_hf -i distilbert/distilgpt2 -o data/distilgpt2.bin       # any owner/name on the hub
    python -m dev.eval.import_hf -i my_model/ -o data/my_model_bf16.bin -d bf16        # a folder

A model is config.json and model.safetensors, in one file or in several, of any GPT2LMHeadModel; one that computes
something else than our GPT-2 is refused. From the hub the files come by HTTPS, once more where they have changed;
owner/name@revision names a branch, a tag or a commit; for a private model set HF_TOKEN. A vocabulary that is not
GPT-2's is kept beside the .bin, in NAME.tokenizer/, for dev/generate.py and for the exports.
A folder needs no import of one's own: `-e my_model/` makes its .bin in passing.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import json
import re
from pathlib import Path
from urllib.parse import quote

from dev.data.command_line import DATA, run, show
from dev.data.download import HF, download, remote_identity
from dev.eval.convert_bin import converter
from dev.run.files import NewFile
from dev.run.hf import OLD_FORMAT, VERSIONS, import_model, shards
from dev.run.reading import read_json
from dev.run.vocabulary import TOKENIZER_FILES


def fetch(model, folder, revision="main"):
    """Bring a model from the hub into a folder, as far as it is not there already, or has changed since."""
    path = folder / ".fetched.json"  # {file: what remote_identity() said}
    known = read_json(path, {str: str}) if path.exists() else {}

    def remember(name, identity):
        if identity is not None and folder.is_dir():
            known[name] = identity
            with NewFile(path) as f:
                f.write(json.dumps(known).encode())

    def get(name):
        url = f"{HF}/{model}/resolve/{quote(revision, safe='')}/{name}"
        identity, there = remote_identity(url), (folder / name).exists()
        if identity is None and there:
            print(f"{name}: the hub does not say whether it has changed; what is here is taken")
        absent = known.get(name) == "" or name != "config.json" and not known  # as an earlier version left it
        if identity == "" or identity is None and (there or absent):
            remember(name, identity if identity == "" else known.get(name))
            return there
        changed = there and known.get(name, identity) != identity
        if changed:
            print(f"{name} has changed on the hub")
        try:
            download(url, folder / name, anew=changed)
            remember(name, identity)
        except ValueError as e:
            if "HTTP status 404" not in str(e):
                raise
            return False
        return True

    if not get("config.json"):
        raise ValueError(f"{HF}/{model} has no config.json\n---> HINT: is this the name of a model, and a revision?")
    for name in TOKENIZER_FILES[:-1]:
        get(name)
    if get("model.safetensors"):
        return
    if not get("model.safetensors.index.json"):
        raise ValueError(f"{HF}/{model} has no model.safetensors\n{OLD_FORMAT}")
    for name in shards(folder / "model.safetensors.index.json"):
        if not get(name):
            raise ValueError(f"{HF}/{model} has no {name}, though its index names it")


def main():
    source = "a folder, or a model on the hub (owner/name, owner/name@revision)"
    parser = converter("A Hugging Face GPT-2 into a checkpoint", source, "a .bin")
    parser.add_argument("-d", "--dtype", choices=VERSIONS, default="fp32")
    parser.add_argument("--data_dir", type=Path, default=DATA, help="keeps what is fetched, in hf/ (default: data/)")
    args = parser.parse_args()
    folder = Path(args.input)
    if not folder.is_dir():
        model = args.input if "/" in args.input.partition("@")[0] else f"openai-community/{args.input}"
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?", model):
            raise FileNotFoundError(f"no such folder: {args.input}\n---> HINT: a model on the hub is owner/name, or "
                                    "owner/name@revision")
        folder = args.data_dir / "hf" / model.replace("/", "--")
        model, _, revision = model.partition("@")
        fetch(model, folder, revision or "main")
    import_model(Path(show(folder)), args.output, args.dtype)


if __name__ == "__main__":
    run(main)
