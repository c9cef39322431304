"""
HellaSwag, https://github.com/rowanz/hellaswag: which of four endings goes on with a text?

    python dev/data/hellaswag.py                    # data/hellaswag/hellaswag_val.bin, 10,042 examples
    python dev/data/hellaswag.py --split train      # 39,905 examples
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

from dev.data.command_line import add_common_flags, run
from dev.data.download import download
from dev.data.readers import LONGEST
from dev.data.shards import write_evalfile
from dev.data.vocabulary import get_encoder
from dev.run.arguments import Parser
from dev.run.console import shown
from dev.run.files import plain_file
from dev.run.reading import parse_json, reading

EXAMPLE = {"ctx": str, "endings": [str], "label": (int, str)}
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"


def examples(path, encoder):
    """
    (context ids, ids of the four endings, which one is right) of each line. An ending begins with a space; where there
    is no context, the end of another text is it: every token is predicted from one before it.
    """
    plain_file(path)
    with reading(path), open(path, encoding="utf-8") as f:
        for number, line in enumerate(iter(lambda: f.readline(LONGEST), ""), 1):
            try:
                item = parse_json(line, EXAMPLE)
                label = int(item["label"])
                if not 0 <= label < len(item["endings"]):
                    raise ValueError(f"label is {label}, and there are {len(item['endings'])} endings")
            except ValueError as e:
                raise ValueError(f"{shown(path)}, line {number} is no HellaSwag example: {shown(e)}") from None
            endings = [list(encoder.encode_ordinary(" " + ending)) for ending in item["endings"]]
            yield list(encoder.encode_ordinary(item["ctx"])) or [encoder.eot_token], endings, label


def main():
    parser = Parser(description="HellaSwag into an evaluation set")
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--base_url", default=URL, help="where hellaswag_{val,train}.jsonl come from")
    add_common_flags(parser)
    args = parser.parse_args()
    folder, name = args.data_dir / "hellaswag", f"hellaswag_{args.split}"
    source = download(f"{args.base_url}/{name}.jsonl", folder / f"{name}.jsonl")
    write_evalfile(folder / f"{name}.bin", examples(source, get_encoder(args.tokenizer)))


if __name__ == "__main__":
    run(main)
