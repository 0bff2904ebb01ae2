"""The networks of a model in one place: opened, and so checked, early; read when first used; let go of when asked."""

from mindsigma.pipeline.text import TextEncoder
from mindsigma.weights.loading import open_t5, open_vae
from mindsigma.weights.locate import components_beside, locate
from mindsigma.weights.tokenizer import Tokenizer


class Components:
    """DiT, VAE, T5 and tokenizer.

    Args:
        dit, vae, t5: Pending networks (weights/loading.py), a Held one, or functions that open one when it is first
            asked for; None where there is none.
        tokenizer: Tokenizer, or a function that opens it.
        controlnets: list of Pending ControlNets; the k-th is called controlnet_name(k).
    """

    def __init__(self, dit=None, vae=None, t5=None, tokenizer=None, controlnets=()):
        self._parts = {"dit": dit, "vae": vae, "t5": t5, "tokenizer": tokenizer}
        self._parts.update((controlnet_name(k), one) for k, one in enumerate(controlnets))
        self.loaded = {}  # name: network with its weights

    @classmethod
    def of_folder(cls, path, dtype=None, text_encoder_memory="whole"):
        """VAE, T5 and tokenizer of a folder, bundled name or hub id with vae/, text_encoder/ and tokenizer/.

        `path`, the folder, is an attribute of the result. A part that is missing is told when it is asked for.
        `text_encoder_memory`: see open_t5.
        """
        parts = ("vae", "text_encoder", "tokenizer")
        path = locate(path, parts)
        elsewhere = components_beside(path) if path.is_dir() else None
        path = path if elsewhere is None else locate(elsewhere, parts)
        made = cls(
            vae=lambda: open_vae(path, dtype),
            t5=lambda: open_t5(path, dtype, text_encoder_memory),
            tokenizer=lambda: Tokenizer(path / "tokenizer"),
        )
        made.path = path
        return made

    def opened(self, name):
        """The part "dit", "vae", "t5" or "tokenizer" before its weights are read; `config` tells what it is."""
        part = self._parts[name]
        if callable(part):
            part = self._parts[name] = part()
        return part

    def network(self, name):
        """The network "dit", "vae" or "t5", with its weights."""
        if name not in self.loaded:
            self.loaded[name] = self.opened(name).load()
        return self.loaded[name]

    @property
    def dit(self):
        """The DiT."""
        return self.network("dit")

    @property
    def vae(self):
        """The VAE."""
        return self.network("vae")

    @property
    def tokenizer(self):
        """The Tokenizer."""
        return self.opened("tokenizer")

    @property
    def text_encoder(self):
        """Tokenizer and T5 as a TextEncoder."""
        return TextEncoder(self.tokenizer, self.network("t5"))

    def exchange(self, name, part):
        """Put a Pending network in the place of another; its weights are read when it is first used.

        Returns whether it is another one than that which is there.
        """
        if part is self._parts[name]:
            return False
        self._parts[name] = part
        self.release(name)
        return True

    def release(self, name):
        """Free a network's memory; it is read again when it is needed."""
        self.loaded.pop(name, None)

    @property
    def notes(self):
        """list[str]: what was assumed or left out while the networks were found."""
        return [note for name in self._parts for note in getattr(self.opened(name), "notes", ())]


def controlnet_name(number):
    """The part of Components that the ControlNet of a number, from 0, is."""
    return f"controlnet {number}"


class Held:
    """A network that is there already, in the place of a Pending one.

    Args:
        cell: the network.
        tensors: what messages call it.
    """

    def __init__(self, cell, tensors):
        self.config, self.dtype, self.tensors, self._cell = cell.config, cell.dtype, tensors, cell

    def load(self):
        """The cell."""
        return self._cell
