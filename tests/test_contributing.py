"""CONTRIBUTING.md's recipes for a layout of data and for a naming of checkpoints, followed as they stand there."""

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from mindsigma.data import BucketSampler, Loader, Resolution, open_data, records
from mindsigma.data.layouts import Layout, find_layout
from mindsigma.data.record import Record
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.loading import load_dit
from mindsigma.weights.locate import BUNDLED
from mindsigma.weights.names import dit_names, prefixes
from mindsigma.weights.names.dit_names import DIFFUSERS
from mindsigma.weights.names.name_map import Rule


def test_a_layout_of_data(tmp_path, monkeypatch):
    """One file with `name | caption` lines beside the images."""

    def rows(folder):
        for line in (folder / "captions.lst").read_text().splitlines():
            name, caption = line.split(" | ")
            yield Record(name, caption, "", 0, 0, str(folder / name))

    def extended(path, image_root=None):
        if (path / "captions.lst").is_file():
            return Layout("list", lambda: rows(path))
        return find_layout(path, image_root)

    monkeypatch.setattr(records, "find_layout", extended)
    for i in range(3):
        Image.fromarray(np.full((64, 64, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.lst").write_text("".join(f"{i}.png | picture {i}\n" for i in range(3)))
    source = open_data(tmp_path)
    assert source.layout == "list" and len(source) == 3 and source.sizes.tolist() == [[64, 64]] * 3
    loader = Loader(source, BucketSampler(source, 3, Resolution(64)), threads=1, caption_dropout=0.0)
    batch = next(iter(loader.batches(0, 1)))
    assert sorted(batch.captions) == ["picture 0", "picture 1", "picture 2"]


def test_a_naming_of_checkpoints(tmp_path, monkeypatch):
    """Every module of ours under another name; it loads with the same weights as the original."""

    def renamed(name):
        return name.replace("blocks", "layers").replace("attn", "attention").replace("embedder", "embed")

    table = tuple(Rule(rule.ours, (renamed(rule.ours),)) for rule in DIFFUSERS)
    monkeypatch.setitem(dit_names.NAMINGS, "x_embed.proj.weight", (table, ()))
    monkeypatch.setitem(prefixes.TELLING, "dit", ("x_embed.proj.weight", *prefixes.TELLING["dit"]))
    ours = read_safetensors(BUNDLED / "sigma-mini" / "dit" / "model.safetensors")[0]
    save_file({renamed(name): np.array(value) for name, value in ours.items()}, tmp_path / "theirs.safetensors")
    dit = load_dit(tmp_path / "theirs.safetensors", input_size=32)
    expected = {parameter.name: parameter for parameter in load_dit("sigma-mini").get_parameters()}
    for parameter in dit.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), expected[parameter.name].asnumpy())
