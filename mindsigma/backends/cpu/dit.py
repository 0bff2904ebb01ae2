"""Parts of a DiT on the native kernels: blocks both ways, what lies before and after them in sampling."""

from itertools import groupby

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindsigma.backends.cpu import kernels
from mindsigma.backends.cpu.apart import each_share
from mindsigma.backends.cpu.embeddings import silu, tensors
from mindsigma.backends.cpu.kernels import Rows
from mindsigma.models.controlnet import ControlNet
from mindsigma.models.dit import FINAL_UNIT, NORM_EPS, UNIT, DiT, DiTBlock, FinalLayer, PatchEmbedding

SHIFT, GATE, MLP_SHIFT, MLP_GATE = 0, 2, 3, 5  # rows of modulation; a scale follows its shift


class FastBlock(DiTBlock):
    """A block in a few calls of the library, in training one each way unless it has q/k norms or compression.

    Of the caption the blocks are handed what cross-attention needs in sampling, keys and values (N, L, 2 * C) and which
    tokens are kept (N, L), and in training, where those have a gradient, the caption itself and the mask.
    """

    computes_again = False  # in the backward pass of training, instead of keeping what it needs

    def recompute(self, *_, **__):
        """Keep nothing but the inputs in training."""
        self.computes_again = True

    def computes_in_kernels(self):
        """Whether nothing of a block in sampling is left to MindSpore's operators."""
        a, c, m = self.attn, self.cross_attn, self.mlp
        changed = any(len(linear.changes) for linear in (a.qkv, a.proj, c.q_linear, c.proj, m.fc1, m.fc2))
        return a.sampling is None and not a.qk_norm and not changed

    def modulation(self, t6):
        """See DiTBlock."""
        return super().modulation(t6) if self.training else unit_sum(self.scale_shift_table, t6, UNIT)

    def text_kv(self, caption, mask):
        """See DiTBlock."""
        kept = kernels.kept_tokens(mask, caption.shape[:2])
        return caption if self.training else kernels.linear(caption, *tensors(self.cross_attn.kv_linear)), kept

    def construct(self, x, modulation, text_k, text_v, height, width, gather=None, text_change=None, perturbed=0):
        """See DiTBlock; modulation may be Rows. In training there is no second result."""
        if self.training:
            if perturbed:
                raise NotImplementedError("perturbed attention is for sampling: set_train(False) first")
            return self.learn(x, modulation, text_k, text_v, height, width), None
        out, change = kernels.empty(*x.shape), kernels.empty(*x.shape) if text_change is None else None
        self.transform(
            x, modulation, (text_k, text_v), height, width, gather, text_change, out, change, perturbed=perturbed
        )
        return out, text_change if change is None else change

    def transform(
        self, x, modulation, text_kv, height, width, gather, text_change, out, change=None, twice=False, perturbed=0
    ):
        """Outside training: the tokens to `out`, which may be x, and what cross-attention adds to `change`, if given.

        `twice`: the second half of the images is as the first, those of guidance before they saw their captions.
        `perturbed`: see DiTBlock; not together with `twice`.
        """
        m, shape, every, rows = self.mlp, x.shape, kernels.memory(x), Rows.of(modulation)
        x1, x2 = kernels.spare("x1", *shape), kernels.spare("x2", *shape)
        half = shape[0] // 2 if twice else shape[0] - perturbed
        self.attend_to_themselves(every.images(0, half), rows, height, width, gather, x1.images(0, half))
        if perturbed:
            self.keep_to_themselves(every.images(half, shape[0]), rows.from_image(half), x1.images(half, shape[0]))
        if twice:
            kernels.array(x1)[half:] = kernels.array(x1)[:half]
        if text_change is None:
            self.attend_to_caption(x1, text_kv, change, x2)
        else:
            np.add(kernels.array(x1), kernels.array(text_change), out=kernels.array(x2))
        h = kernels.spare("hidden", *shape[:-1], m.fc1.weight.shape[0])
        kernels.linear(x2, *tensors(m.fc1), rows=rows, norm_row=MLP_SHIFT, eps=NORM_EPS, gelu=True, out=h)
        return kernels.linear(h, *tensors(m.fc2), rows=rows, gate_row=MLP_GATE, residual=x2, out=out)

    def attend_to_themselves(self, x, rows, height, width, gather, out):
        """out = x + gated self-attention."""
        a = self.attn
        q, k, v = self.queries_keys_values(x, rows, height, width)
        if gather is not None:
            k, v = gather(*map(kernels.as_tensor, (k, v)))
        answer = kernels.attention(q, k, v, a.number, a.scale, out=kernels.spare("answer", *x.shape))
        kernels.linear(answer, *tensors(a.proj), rows=rows, gate_row=GATE, residual=x, out=out)

    def keep_to_themselves(self, x, rows, out):
        """out = x + gated self-attention of tokens that each attend to itself alone."""
        a, channels = self.attn, x.shape[-1]
        weight, bias = map(kernels.memory, tensors(a.qkv))
        weight, bias = weight.images(2 * channels, 3 * channels), bias.columns(2 * channels, channels)
        v = kernels.spare("answer", *x.shape)
        kernels.linear(x, weight, bias, rows=rows, norm_row=SHIFT, eps=NORM_EPS, out=v)
        kernels.linear(v, *tensors(a.proj), rows=rows, gate_row=GATE, residual=x, out=out)

    def queries_keys_values(self, x, rows, height, width):
        """What self-attention attends with and to: (N, T, C) and twice (N, K, C)."""
        a, channels = self.attn, x.shape[-1]
        qkv = kernels.spare("qkv", *x.shape[:-1], 3 * channels)
        kernels.linear(x, *tensors(a.qkv), rows=rows, norm_row=SHIFT, eps=NORM_EPS, out=qkv)
        q, k, v = (qkv.columns(i * channels, channels) for i in range(3))
        if a.qk_norm:
            q, k = a.q_norm(kernels.as_tensor(q)), a.k_norm(kernels.as_tensor(k))
        if a.sampling is not None:
            k, v = (a.compress(kernels.as_tensor(t), height, width) for t in (k, v))
        return q, k, v

    def attend_to_caption(self, x, text_kv, change, out):
        """out = x + what attention to the caption gives; who attends to a single token gets the value of that."""
        c, channels = self.cross_attn, x.shape[-1]
        kv, kept = map(kernels.memory, text_kv)
        images = kernels.array(kept)
        only = [token if count == 1 else None for token, count in zip(images.argmax(1), images.sum(1))]
        for single, same in groupby(range(len(only)), lambda i: only[i] is not None):
            same = list(same)
            first, last = same[0], same[-1] + 1
            x_part, kv_part, out_part = (t.images(first, last) for t in (x, kv, out))
            change_part = None if change is None else kernels.memory(change).images(first, last)
            if not single:
                q = kernels.linear(x_part, *tensors(c.q_linear), out=kernels.spare("q", *x_part.shape))
                k, v = kv_part.columns(0, channels), kv_part.columns(channels, channels)
                answer = kernels.spare("answer", *x_part.shape)
                kernels.attention(q, k, v, c.number, c.scale, kept.images(first, last), out=answer)
                kernels.linear(answer, *tensors(c.proj), residual=x_part, kept=change_part, out=out_part)
                continue
            value = kernels.array(kv_part)[range(last - first), only[first:last], channels:]  # (images, C)
            row = kernels.array(kernels.linear(value, *tensors(c.proj), out=kernels.spare("row", *value.shape)))[
                :, None
            ]
            np.add(kernels.array(x_part), row, out=kernels.array(out_part))
            if change is not None:
                kernels.array(change_part)[:] = row

    def learn(self, x, modulation, caption, kept, height, width):
        """The tokens (N, T, C), differentiable."""
        a, c, m = self.attn, self.cross_attn, self.mlp
        own_qkv = not a.qk_norm and a.sampling is None
        parts = (*((a.qkv,) if own_qkv else ()), a.proj, c.q_linear, c.kv_linear, c.proj, m.fc1, m.fc2)
        weights = [t for part in parts for t in tensors(part)]
        frozen = weights if all(isinstance(t, Parameter) and not t.requires_grad for t in weights) else None
        run = BlockCall(a.number, kernels.array(kept).copy(), not self.computes_again, frozen)
        weights = () if frozen else weights
        if own_qkv:
            return run(x, modulation, caption, *weights)
        qkv = ModulatedLinear()(x, modulation, *tensors(a.qkv))
        q, k, v = ops.split(qkv, x.shape[-1], -1)
        if a.qk_norm:
            q, k = a.q_norm(q), a.k_norm(k)
        if a.sampling is not None:
            k, v = a.compress(k, height, width), a.compress(v, height, width)
        return run(x, modulation, caption, q, k, v, *weights)


class BlockCall(nn.Cell):
    """One call of a block in training, which keeps what its backward pass needs.

    Args:
        heads: number of attention heads.
        kept: array (N, L), 0 for tokens of the caption that are dropped.
        keep: whether to keep anything but the inputs.
        frozen: list of weights and biases, see kernels.block, that need no gradient; None: they are inputs.
    """

    def __init__(self, heads, kept, keep, frozen=None):
        super().__init__(auto_prefix=False)
        self.heads, self.kept, self.keep, self.weights = heads, kept, keep, (lambda: frozen)

    def construct(self, x, modulation, caption, *rest):
        """`rest`: queries, keys and values, unless these are x's, then weights and biases unless they are frozen."""
        rest = (*rest, *(self.weights() or ()))
        self.block = kernels.block(x, modulation, caption, self.kept, rest, self.heads, NORM_EPS)
        out, self.saved = kernels.block_forward(self.block, self.keep)
        return out

    def bprop(self, *arguments):
        """Gradients of all inputs; the last two arguments are the result and its gradient."""
        return kernels.block_backward(self.block, arguments[-1], self.saved, self.weights() is not None)


class ModulatedLinear(nn.Cell):
    """The linear map to queries, keys and values, with its norm, differentiable."""

    def construct(self, x, modulation, weight, bias):
        return kernels.linear(x, weight, bias, rows=Rows.of(modulation), norm_row=SHIFT, eps=NORM_EPS)

    def bprop(self, x, modulation, weight, bias, out, gradient):
        return kernels.modulated_gradient(gradient, x, modulation, SHIFT, weight, NORM_EPS)


class FastDiT(DiT):
    """A network whose tokens lie in memory that each block uses again."""

    def embed_timestep(self, timestep, image_size=None, aspect_ratio=None):
        """See DiT."""
        if self.training:
            return super().embed_timestep(timestep, image_size, aspect_ratio)
        t = self.t_embedder(timestep, self.dtype)
        if self.config.micro_condition:
            sizes = self.csize_embedder(image_size, self.dtype), self.ar_embedder(aspect_ratio, self.dtype)
            t = Tensor(kernels.array(t) + np.concatenate(list(map(kernels.array, sizes)), -1))
        return t, kernels.linear(silu(t), *tensors(self.t_block[1]))

    def split_modulation(self, modulation):
        """See DiT; in Rows."""
        rows = Rows.of(modulation)
        return tuple(rows.from_row(6 * i) for i in range(self.config.depth + 1))

    def run(self, latents, modulations, text_kv, position, gather=None, control=None):
        """See DiT."""
        if self.training:
            return super().run(latents, modulations, text_kv, position, gather, control)
        p, modulations = self.config.patch_size, tuple(map(Rows.of, modulations))
        height, width = latents.shape[2] // p, latents.shape[3] // p
        x = kernels.spare("tokens", latents.shape[0], height * width, self.config.hidden_size)
        self.x_embedder.tokens(latents.astype(self.dtype), position, x)
        halves = kernels.array(x).reshape(2, -1) if x.shape[0] % 2 == 0 else None
        twice = halves is not None and modulations[0].step == 0 and np.array_equal(*halves)
        first, *others = self.blocks
        first.transform(x, modulations[0], text_kv[0], height, width, gather, None, x, twice=twice)
        added = control(kernels.as_tensor(x)) if control is not None else ()
        added = list(map(kernels.memory, added))
        text_kv = [tuple(map(kernels.memory, pair)) for pair in text_kv]

        def finish(begin, end):
            part = x.images(begin, end)
            for i, block in enumerate(others, 1):
                if i <= len(added):
                    np.add(kernels.array(part), kernels.array(added[i - 1].images(begin, end)), out=kernels.array(part))
                rows, text = modulations[i].from_image(begin), [each.images(begin, end) for each in text_kv[i]]
                block.transform(part, rows, text, height, width, gather, None, part)

        if gather is None and all(block.computes_in_kernels() for block in others):
            each_share(x.shape[0], finish)
        else:
            finish(0, x.shape[0])
        return self.final_layer(x, modulations[self.config.depth], height, width)


class FastControlNet(ControlNet):
    """A ControlNet whose tokens lie in memory that each copy uses again."""

    def split_modulation(self, modulation):
        """See ControlNet; in Rows."""
        rows = Rows.of(modulation)
        return tuple(rows.from_row(6 * i) for i in range(self.config.layers))

    def construct(self, x, hint, modulations, text_kv, height, width, scales=None, gather=None):
        """See ControlNet."""
        if self.training:
            return super().construct(x, hint, modulations, text_kv, height, width, scales, gather)
        c, added = kernels.spare("control", *x.shape), ()
        np.add(kernels.array(x), kernels.array(hint), out=kernels.array(c))
        for i, block in enumerate(self.blocks):
            block.transform(c, modulations[i], text_kv[i], height, width, gather, None, c)
            change = kernels.linear(c, *tensors(self.after_proj[i]))
            if scales is not None:
                kernels.array(change)[:] *= scales.asnumpy()[i]
            added += (change,)
        return added


class FastPatchEmbedding(PatchEmbedding):
    """Patches to tokens."""

    def construct(self, latents, position):
        """See PatchEmbedding."""
        if self.training:
            return super().construct(latents, position)
        p = self.patch_size
        tokens = latents.shape[2] // p * (latents.shape[3] // p)
        return self.tokens(latents, position, kernels.empty(latents.shape[0], tokens, self.proj.weight.shape[0]))

    def tokens(self, latents, position, out):
        """`construct` outside training, to `out`."""
        batch, channels, height, width = latents.shape
        p, weight = self.patch_size, kernels.memory(tensors(self.proj)[0])
        tokens, inner = height // p * (width // p), channels * p * p
        patches = kernels.array(latents).reshape(batch, channels, height // p, p, width // p, p)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, tokens, inner)  # a copy
        weight = weight.reshaped(weight.shape[0], inner)
        target, position = kernels.memory(out), kernels.memory(position)
        for i in range(batch):
            part = target.images(i, i + 1)
            kernels.linear(patches[i : i + 1], weight, self.proj.bias, residual=position, out=part)
        return out


class FastFinalLayer(FinalLayer):
    """Tokens to patches."""

    def modulation(self, t):
        """See FinalLayer."""
        return super().modulation(t) if self.training else unit_sum(self.scale_shift_table, t, FINAL_UNIT)

    def construct(self, x, modulation, height, width):
        """See FinalLayer."""
        if self.training:
            return super().construct(x, modulation, height, width)
        weight, bias = tensors(self.linear)
        patches = kernels.spare("patches", *x.shape[:-1], weight.shape[0])
        kernels.linear(x, weight, bias, rows=Rows.of(modulation), norm_row=SHIFT, eps=NORM_EPS, out=patches)
        batch, p = x.shape[0], self.patch_size
        patches = kernels.array(patches).reshape(batch, height, width, p, p, -1).transpose(0, 5, 1, 3, 2, 4)
        out = kernels.empty(batch, patches.shape[1], height * p, width * p)
        kernels.array(out).reshape(patches.shape)[:] = patches
        return out


def unit_sum(table, t, unit):
    """Modulation (N, R, C): a table (R, C) plus that of timesteps, (N, R * C) or for all rows (N, C), plus the unit."""
    table, t = kernels.array(table), kernels.array(t)
    return Tensor(table + t.reshape(len(t), -1, table.shape[1]) + unit)
