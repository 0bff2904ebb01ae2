"""The reference cases of ControlNets, golden/controlnet.npz: networks with drawn weights, arrays; small networks."""

import json

import numpy as np
from conftest import GOLDEN, drawn_weight
from mindspore import Tensor
from test_perturbed import drawn, small_dit

from mindsigma import load_dit
from mindsigma.backends.cpu import accelerate
from mindsigma.models.controlnet import ControlNet, ControlNetConfig
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.models.dit_config import canonical_fields
from mindsigma.sampling.controls import Control
from mindsigma.sampling.denoising import DenoisingGraphs
from mindsigma.weights.names import controlnet_names, dit_names
from mindsigma.weights.names.name_map import slots

FILE = GOLDEN / "controlnet.npz"


class ControlCase:
    """One of "half", "ms" (the official code) and "sigma" (SimpleTuner): its arrays are attributes of `data`."""

    def __init__(self, name):
        stored = np.load(FILE)
        self.data = {key.partition("/")[2]: stored[key] for key in stored.files if key.startswith(f"{name}/")}
        config = json.loads(str(self.data["config"]))
        self.official = "control" in config
        self.layers = config["copy_blocks_num" if self.official else "controlnet_layers"]
        known = {"hidden_size", "depth", "num_heads", "caption_channels", "model_max_length", "input_size"}
        fields = {name: value for name, value in config.items() if name in known}
        if self.official:
            fields.update(pe_interpolation=config["lewei_scale"], multi_scale=config["cls"] == "PixArtMS")
            fields["micro_condition"] = config["cls"] == "PixArtMS"
        else:
            fields.update(
                hidden_size=config["cross_attention_dim"],
                depth=config["num_layers"],
                num_heads=config["num_attention_heads"],
                caption_channels=config["caption_channels"],
                input_size=config["sample_size"],
                pe_interpolation=config["interpolation_scale"],
            )
        self.config = DiTConfig(**canonical_fields(fields))

    def networks(self, draw=True):
        """(DiT, ControlNet) with the case's weights, the second fresh beside the first unless `draw`."""
        dit = DiT(self.config)
        for parameter in dit.get_parameters():
            parameter.set_data(Tensor(self._base(parameter.name, parameter.shape)))
        if not draw:
            return dit, ControlNet.from_dit(dit, self.layers)
        controlnet = ControlNet(ControlNetConfig.of(self.config, self.layers))
        for name, parameter in controlnet.parameters_and_names():
            parameter.set_data(Tensor(self._control(name, parameter.shape)))
        return dit, controlnet

    def inputs(self, condition="c"):
        """Arguments of ControlledDiT: latents, condition, timestep, caption, mask, micro conditions if there are."""
        caption = self.data["y"][:, 0] if self.official else self.data["y"]
        arrays = [self.data["x"], self.data[condition], self.data["timestep"].astype(np.float32), caption]
        arrays.append(self.data["mask"])
        if self.config.micro_condition:
            arrays += [self.data["img_hw"], self.data["aspect_ratio"]]
        return [Tensor(array) for array in arrays]

    def _base(self, name, shape):
        if self.official:
            return drawn_weight(int(self.data["seed"]), f"base_model.{name}", shape)
        return self._joined("seed", slots(dit_names.DIFFUSERS, name), shape)

    def _control(self, name, shape):
        if self.official:
            return drawn_weight(int(self.data["seed"]), slots(controlnet_names.OFFICIAL, name)[0], shape)
        return self._joined("adapter_seed", slots(controlnet_names.DIFFUSERS, name), shape)

    def _joined(self, seed, names, shape):
        """A tensor of ours from those that diffusers has in its place."""
        part = (shape[0] // len(names), *shape[1:])
        return np.concatenate([drawn_weight(int(self.data[seed]), name, part) for name in names])


def mini_controlnet():
    """The ControlNet of the case "mini", beside sigma-mini: fresh copies of 3 blocks, drawn linear maps."""
    stored = np.load(FILE)
    controlnet = ControlNet.from_dit(load_dit("sigma-mini"), int(stored["mini/copy_blocks_num"]))
    seed, scale = int(stored["mini/seed"]), np.float32(stored["mini/scale"])
    for name, parameter in controlnet.parameters_and_names():
        if not name.startswith("blocks."):
            official = slots(controlnet_names.OFFICIAL, name)[0]
            parameter.set_data(Tensor(scale * drawn_weight(seed, official, parameter.shape)))
    return controlnet


def mini_edges():
    """The picture of edges of the case "mini", bytes (256, 256, 3), white on black."""
    stored = np.load(FILE)
    height, width = stored["mini/edge_hw"]
    bits = np.unpackbits(stored["mini/edge"])[: height * width].reshape(height, width, 1)
    return np.repeat(bits * np.uint8(255), 3, 2)


def small(kind="conv and q/k norm", layers=2, seed=0, fast=False):
    """DenoisingGraphs of a small DiT and a ControlNet beside it with drawn linear maps."""
    dit = small_dit(kind)
    controlnet = ControlNet.from_dit(dit, layers)
    for k, (name, parameter) in enumerate(controlnet.parameters_and_names()):
        if not name.startswith("blocks."):
            parameter.set_data(Tensor(0.1 * drawn(100 + seed + k, *parameter.shape)))
    if fast:
        accelerate(dit), accelerate(controlnet)
    return DenoisingGraphs(dit), controlnet


def control(controlnet, seed=50, rows=2, **how):
    """A Control of a drawn condition."""
    return Control(controlnet, drawn(seed, rows, 4, 8, 8), **how)
