"""Files of prompts: what a line may say, and how each mistake is named; names of the pictures."""

import pytest

from mindsigma.commands.generate_options import build_parser
from mindsigma.commands.picture_names import Names, check_template, fill
from mindsigma.commands.prompt_file import read_prompt_file
from mindsigma.commands.rows import batches_of, columns_of, jobs_of, read_rows
from mindsigma.errors import MindSigmaError


@pytest.fixture
def rows(tmp_path):
    """rows(name, content, *flags): the Rows of a prompt file, judged."""

    def read(name, content, *flags):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        parser = build_parser()
        found = read_rows(parser.parse_args(["--prompts-file", str(file), *flags]), parser)
        for row in found:
            row.judge()
        return found

    return read


def test_text(rows):
    found = rows("a.txt", "a cat\r\n\n  # no prompt\n a dog --ar 3:4 \n", "--steps", "7")
    assert [row.prompt.text for row in found] == ["a cat", "a dog"]
    assert found[1].prompt.ratio == 0.75 and {row.sampling.num_inference_steps for row in found} == {7}


CSV = """prompt,negative_prompt,seed,height,width,steps,guidance_scale,sampler,num_images,lora,resolution_binning
a cat,,5,256,512,4,3.5,dpm,2,,no
"a dog, wet",dark,,,,,,euler,,a.safetensors:0.5; b,

a cow,,,,,,,,,,
"""


def test_table(rows):
    cat, dog, cow = rows("a.csv", CSV, "--steps", "9", "--negative-prompt", "light")
    assert (cat.sampling.num_inference_steps, cat.sampling.guidance_scale, cat.sampling.sampler) == (4, 3.5, "dpm")
    assert (cat.args.height, cat.args.width, cat.args.seed, cat.args.num_images) == (256, 512, 5, 2)
    assert cat.sampling.use_resolution_binning is False and cow.sampling.use_resolution_binning is True
    assert (dog.prompt.text, dog.args.negative_prompt, dog.sampling.sampler) == ("a dog, wet", "dark", "euler")
    assert dog.lora == ("a.safetensors:0.5", "b") and cat.lora == ()
    assert (cow.args.negative_prompt, cow.sampling.num_inference_steps, cow.args.seed) == ("light", 9, 0)
    assert [(job.row.prompt.text, job.seed) for job in jobs_of([cat, dog, cow])] == [
        ("a cat", 5),
        ("a cat", 6),
        ("a dog, wet", 0),
        ("a cow", 0),
    ]


def test_json_lines(rows):
    lines = [
        '{"prompt": "a cat", "seed": 5, "num_inference_steps": 4, "guidance-scale": 3, "guidance_interval": [0, 0.5]}',
        "",
        '{"prompt": "a dog", "negative_prompt": "", "clean_caption": true, "lora": ["x:2"], "steps": null}',
    ]
    cat, dog = rows("a.jsonl", "\n".join(lines), "--negative-prompt", "light")
    assert (cat.args.seed, cat.sampling.num_inference_steps, cat.sampling.guidance_interval) == (5, 4, (0.0, 0.5))
    assert dog.args.negative_prompt == "" and dog.sampling.clean_caption and dog.lora == ("x:2",)


WRONG = {
    "unknown column": ("a.csv", "prompt,stepz\na cat,3\n", "a.csv, line 2: unknown column 'stepz'; known: prompt, neg"),
    "meant": ("a.csv", "prompt,stepz\na cat,3\n", "; did you mean steps?"),
    "no prompt column": ("a.csv", "text,steps\na cat,3\n", "a.csv, line 1: the first line must name the columns"),
    "column twice": ("a.csv", "prompt,seed,seed\na,1,2\n", "line 1: the column 'seed' stands twice"),
    "cells": ("a.csv", "prompt,steps\na cat,3\na dog\n", "line 3: has 1 cells, the header 2 columns"),
    "no number": ("a.csv", "prompt,steps\na,many\n", "line 2: steps has a value of the wrong kind: 'many'"),
    "no whole number": ("a.jsonl", '{"prompt": "a", "steps": 2.5}', "line 1: steps has a value of the wrong kind: 2.5"),
    "no choice": ("a.csv", "prompt,sampler\na,dmp\n", "line 2: sampler must be one of dpm, "),
    "out of range": ("a.csv", "prompt,steps\na,3\nb,1000\n", "line 3: num_inference_steps must be a whole number of 1"),
    "no truth": ("a.jsonl", '{"prompt": "a", "clean_caption": "maybe"}', "clean_caption must be true or false"),
    "two objects": ("a.jsonl", '{"prompt": "a"}{"prompt": "b"}', "line 1: this line is not valid JSON"),
    "a list": ("a.jsonl", "\n[1]", "line 2: this line is not a JSON object"),
    "key twice": ("a.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "line 1: this line gives the key 'seed' twice"),
    "empty prompt": ("a.csv", "prompt,seed\n,1\n", "line 2: has no prompt"),
    "no prompt": ("a.jsonl", '{"seed": 1}', "line 1: has no prompt"),
    "prompt a number": ("a.jsonl", '{"prompt": 1}', "line 1: has no prompt"),
    "a flag in the prompt": ("a.csv", "prompt\na --ar x\n", "line 2: the prompt 'a --ar x': --ar must be followed"),
    "only a header": ("a.csv", "prompt,seed\n", "a.csv: holds no prompt"),
    "a quote": ("a.csv", 'prompt\n"a" b\n', "line 2: not CSV"),
    "not text": ("a.csv", b"prompt\n\xff\n", "a.csv: not UTF-8 text"),
    "an option of the run": ("a.csv", "prompt,out\na,b\n", "line 2: unknown column 'out'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_name_their_line(rows, case):
    name, content, words = WRONG[case]
    with pytest.raises(MindSigmaError) as caught:
        rows(name, content)
    assert words in str(caught.value) and str(caught.value).startswith("--prompts-file ")


def test_every_option_of_sampling_is_a_column():
    from dataclasses import fields

    from mindsigma.sampling.options import SamplingOptions

    columns = columns_of(build_parser())
    assert {field.name for field in fields(SamplingOptions)} <= set(columns)
    assert {"negative_prompt", "seed", "num_images", "lora", "image", "mask", "steps"} <= set(columns)
    assert not {"out", "model", "config", "device", "batch_size"} & set(columns)


def test_batches_hold_neighbours_of_one_kind(rows):
    found = rows("a.csv", "prompt,steps,num_images\na,2,3\nb,2,\nc,3,\nd,2,\n")
    jobs = jobs_of(found)
    assert list(batches_of(jobs, 2)) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert list(batches_of(jobs, 9)) == [(0, 4), (4, 5), (5, 6)]


# names


def test_names_from_a_template():
    numbers = {"seed": 7, "number": 3, "image": 1, "width": 512, "height": 256, "steps": 20, "guidance": 4.5}
    texts = {"prompt": "A Cat, ../../etc", "model": "m/x", "sampler": "dpm"}
    assert fill("{prompt}-{seed}", numbers, texts) == "a-cat-etc-7"
    assert fill("{number:04d}_{width}x{height}_{guidance:.1f}", numbers, texts) == "0003_512x256_4.5"
    assert fill("{prompt}", numbers, {**texts, "prompt": "..."}) == "image"
    assert len(fill("{prompt}{prompt}{prompt}", numbers, {**texts, "prompt": "ä" * 500}).encode()) <= 200
    assert fill("..", numbers, texts) == "image"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{promt}", "unknown field {promt}; known: prompt, model, sampler, seed"),
        ("{promt}", "did you mean prompt?"),
        ("{prompt.__class__}", "unknown field {prompt.__class__}"),
        ("{seed:9999999999}", "the form '9999999999' of a field is not read"),
        ("{seed:{number}}", "of a field is not read"),
        ("{seed", "write it as in"),
        ("{}", "unknown field {}"),
        ("a/{seed}", "a name holds no slashes"),
    ],
)
def test_wrong_templates(template, words):
    with pytest.raises(MindSigmaError) as caught:
        check_template(template)
    assert words in str(caught.value)


def test_free_names(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a-2.png").symlink_to("nowhere")
    names = Names()
    assert [names.free(tmp_path / "a.png").name for _ in range(2)] == ["a-3.png", "a-4.png"]
    again = Names(overwrite=True)
    assert [again.free(tmp_path / "a.png").name for _ in range(2)] == ["a.png", "a-2.png"]  # none twice in a run


def test_read_prompt_file_of_a_text_needs_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    assert read_prompt_file(tmp_path / "a.txt", {}) == [(f"--prompts-file {tmp_path}/a.txt, line 1", {"prompt": "x"})]
