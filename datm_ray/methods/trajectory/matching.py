"""The matching loss and its exact gradient, with the graph of only a few images of one student step in memory.

    student step     theta_{i+1} = theta_i - alpha * g_i,     g_i = grad_theta l(theta_i; A_i(X[b_i]), Y[b_i])
    matching loss    L = |theta_T - theta*|^2 / |theta_0 - theta*|^2

Full unrolling keeps the graphs of all T steps. This module keeps only the T parameter vectors; its reverse sweep is the
adjoint of the recursion above. With v_T = dL/dtheta_T and, for i = T-1 ... 0, s_i = <v_{i+1}, g_i>:

    X.grad -= alpha ds_i/dX     Y.grad -= alpha ds_i/dY     alpha.grad -= s_i     v_i = v_{i+1} - alpha ds_i/dtheta_i

The result equals the gradient of full unrolling; it is no approximation (TESLA drops the effect of the last term).
Norms may leave out the first parameters (PAD). The student still trains them, and v_T is 0 there.
Augmentation A_i is applied outside the compiled step, and differentiated by its own vector-Jacobian product. A_i does
not depend on theta, so this is exact too. For the same reason the images of many steps can be augmented together, and
their gradients pass back together (see `_Block`). This saves launches of kernels, which take a GPU longer than the
augmentation of a small step itself.

The loss l is a mean over the minibatch, so g_i and s_i are sums over its images. The images are computed in chunks
(micro-batches), so that memory does not grow with the batch. Class shards, workers that each hold the images of some
classes, add their sums.

Shapes: n synthetic images, b batch, k classes, p parameters, T student steps. The code is written for one process; a
class shard passes `all_sum`, which adds a tensor over all shards (see `runtime/mesh.py`). Tests:
tests/methods/trajectory/test_matching.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from datm_ray.core.compute.gpu import uploaded
from datm_ray.core.images.augment import Augmentation, apply_operation, draw_augmentation
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.synthetic import AllSum, SyntheticSet, identity
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions

BLOCK_BYTES, CPU_BLOCK_BYTES = 2**26, 2**18
"""Largest size in bytes of the images of several student steps that are augmented together (a `_Block`): on a GPU, and
on a CPU.

A larger step is augmented alone, because its kernels take longer than their launches, so that sharing saves nothing.
The GPU's limit is assumed. On a CPU, digits need no larger blocks, and larger images in larger blocks were sometimes
slower (benchmarks/LOG.md)."""
BLOCK_COPIES = 8
"""Memory of a block (student steps that are augmented together), as a multiple of the size of its images: raw images,
augmented images, what the derivative keeps, and gradients. Assumed."""
CPU_DIVIDED_SUM = 2**15
"""Smallest number of values in a tensor whose sum torch divides among a CPU's threads, if the call computes no other
sum. An image with at least this number of values may get other bits in a batch than alone. So on a CPU, pieces (parts
of minibatches) with such images are augmented one by one."""


@dataclass(frozen=True)
class StudentStep:
    """Minibatch of one student step: the images and their augmentation."""

    rows: NDArray[np.int64]
    """[b] indices of the images in the synthetic set, without repetition."""
    augmentation: Augmentation
    """Augmentation of the images in `rows`, in the same order."""
    global_batch: int
    """Number of images in the whole minibatch, over all shards; the loss is a mean over them."""

    def held_by(self, first: int, last: int) -> StudentStep:
        """Part of the minibatch for a shard that holds images [first, last) of the set and numbers them from 0."""
        held = np.flatnonzero((self.rows >= first) & (self.rows < last))
        return StudentStep(self.rows[held] - first, self.augmentation.take(held), self.global_batch)

    def chunks(self, size: int | None) -> Iterator[StudentStep]:
        """Split the minibatch into pieces (smaller minibatches) of at most `size` images; `None` gives one piece."""
        for start in range(0, len(self.rows), size or max(1, len(self.rows))):
            piece = np.arange(start, min(start + (size or len(self.rows)), len(self.rows)))
            yield StudentStep(self.rows[piece], self.augmentation.take(piece), self.global_batch)


def draw_student_steps(
    images: int, steps: int, batch: int, strategy: str, seed: int, iteration: int, backbone: int = 0
) -> list[StudentStep]:
    """Draw one backbone's minibatches for one iteration: shuffled passes over the set, cut into batches.

    If the batch size does not divide the size of the set, each pass starts with the smaller batch, as in MTT's program.

    Args:
        images: number of images in the set.
        steps: number of student steps, each with one minibatch.
        batch: number of images in a minibatch.
        strategy: operations of augmentation, such as "crop_flip", from which each step draws one; "" for none.
        seed: seed of the run.
        iteration: number of the iteration, from 0.
        backbone: index of the backbone, which has draws of its own.
    """
    drawn: list[StudentStep] = []
    batch = min(batch, images)
    per_pass = -(-images // batch)
    for step in range(steps):
        number, position = divmod(step, per_pass)
        if position == 0:
            order = generator(seed, Purpose.STUDENT_ORDER, backbone, iteration, number).permutation(images)
            chunks = [order[first : first + batch] for first in range(0, images, batch)][::-1]
        rows = chunks[position]
        draw = generator(seed, Purpose.STUDENT_AUGMENTATION, backbone, iteration, step)
        drawn.append(StudentStep(rows, draw_augmentation(strategy, len(rows), draw), len(rows)))
    return drawn


def first_shown(
    rows: NDArray[np.int64], images: int, steps: int, batch: int, strategy: str, seed: int, iteration: int
) -> list[Augmentation]:
    """Augmentation of each of the images `rows` when the first backbone's student first sees it in an iteration.

    Images that the student does not see in the iteration get one operation, drawn for the iteration, each with own
    parameters.

    Args:
        rows: [b] indices of the images in the whole set.
        images, steps, batch, strategy, seed, iteration: arguments of `draw_student_steps`, which draws the minibatches
            that the student sees.
    """
    per_pass = -(-images // min(batch, images))  # within one pass, no image comes twice
    drawn = draw_student_steps(images, min(steps, per_pass), batch, strategy, seed, iteration)
    unseen = draw_augmentation(strategy, images, generator(seed, Purpose.META_AUGMENTATION, iteration))
    shown = {row: (unseen, row) for row in rows.tolist()}
    for step in drawn:
        shown.update({row: (step.augmentation, place) for place, row in enumerate(step.rows.tolist()) if row in shown})
    return [augmentation.take(np.array([place])) for augmentation, place in map(shown.__getitem__, rows.tolist())]


@dataclass(frozen=True)
class MatchingGradient:
    """Matching loss of one backbone in one iteration, and its gradient."""

    loss: float
    """Normalised matching loss; 1 means that the student came no closer to the target."""
    images: Tensor
    """[n c h w] gradient of the loss with respect to the images."""
    soft_labels: Tensor
    """[n k] gradient of the loss with respect to the soft labels' logits."""
    step_size: Tensor
    """[] gradient of the loss with respect to the student's step size."""


def matching_gradient(
    functions: StudentStepFunctions,
    start: Tensor,
    target: Tensor,
    synthetic: SyntheticSet,
    steps: PlacedSteps,
    *,
    backbone: int = 0,
    skip_above: float = math.inf,
    first: int = 0,
    all_sum: AllSum = identity,
) -> MatchingGradient:
    """Compute the normalised matching loss and its exact gradient with respect to images, soft labels and step size.

    Memory holds len(steps) + 1 parameter vectors, one sum of gradients per learned variable, and the activations of one
    chunk of one student step.

    Args:
        start, target: [p] expert parameters at the start epoch and at the target epoch.
        synthetic: the synthetic set, or this class shard's part of it.
        steps: minibatches from `draw_student_steps`, or this shard's parts of these minibatches, from `place_steps`.
        backbone: index of the backbone, whose step size the student uses.
        skip_above: a loss above this limit, or nan, is not differentiated. The result then has a gradient of zeros.
        first: index of the first parameter that counts in the loss; both its norms leave out earlier parameters.
        all_sum: function that sums a tensor over class shards (workers with different classes).
    """
    step_size = synthetic.step_sizes[backbone]
    sweep = _Sweep(functions, synthetic, steps)
    trace = [start]
    for step in range(len(steps)):
        trace.append(trace[-1] - step_size * all_sum(sweep.student_gradient(trace[-1], step)))
    distance = (start - target)[first:].square().sum()
    gap = trace.pop() - target
    gap[:first] = 0
    loss = _agreed(gap.square().sum() / distance, all_sum)
    images, soft_labels = torch.zeros_like(synthetic.images), torch.zeros_like(synthetic.soft_labels)
    d_step_size = torch.zeros_like(step_size)
    if not loss <= skip_above:
        return MatchingGradient(loss, images, soft_labels, d_step_size)
    v = 2 * gap / distance
    for step in reversed(range(len(steps))):
        summed = all_sum(sweep.reverse(trace.pop(), step, v, images, soft_labels))
        d_step_size -= summed[-1]
        v = v - step_size * summed[:-1]
    return MatchingGradient(loss, images.mul_(-step_size), soft_labels.mul_(-step_size), d_step_size)


def first_matched(parameters: int, unmatched_share: float) -> int:
    """Index of the first matched parameter, if the first `unmatched_share` (in [0, 1)) of the parameters is left out.

    Parameters are in the network's order, from the layer that reads the images to the classifier.
    """
    return int(unmatched_share * parameters)


def _agreed(loss: Tensor, all_sum: AllSum) -> float:
    """Mean of the class shards' values of one loss, which machines may round differently; equal in all shards.

    With this mean, either all shards skip an iteration, or none.
    """
    total, shards = all_sum(torch.stack([loss, torch.ones_like(loss)])).tolist()
    return float(total / shards)


@dataclass(frozen=True)
class _Piece:
    """Part of a minibatch that one call of the step functions computes, with its tensors on the device."""

    rows: Tensor
    """[b] indices of the images, among those that this class shard (a worker with some classes) holds."""
    operation: str
    uniform: Tensor
    """[b u] parameters of the augmentation in [0, 1): u numbers for each image, see `Augmentation.parameters`."""
    weights: Tensor
    """[b] weights of the images in the loss; if a chunk size is set, [chunk] with zeros at the end for the padding."""


PlacedSteps = Sequence[Sequence[_Piece]]
"""Minibatches of student steps, which `place_steps` has cut into pieces (parts) and copied to the device."""


def place_steps(steps: Sequence[StudentStep], chunk: int | None, like: Tensor) -> PlacedSteps:
    """Split each step's minibatch into pieces (parts of at most `chunk` images) and copy them to the device of `like`.

    There are three asynchronous copies in all.

    Args:
        chunk: largest number of images of a piece; `None` for whole minibatches. A smaller rest is padded with images
            of weight 0, so that only one shape is compiled.
        like: tensor of the type and on the device of the images.
    """
    cut = [list(step.chunks(chunk)) for step in steps]
    flat = [piece for pieces in cut for piece in pieces]
    sizes = [len(piece.rows) for piece in flat]
    padded = [chunk or size for size in sizes]
    numbers = [piece.augmentation.parameters.ravel() for piece in flat]  # flat, because widths differ by operation
    weights = [np.zeros(size) for size in padded]
    for weight, piece in zip(weights, flat, strict=True):
        weight[: len(piece.rows)] = 1 / piece.global_batch
    columns = (
        uploaded([piece.rows for piece in flat], like.device).split(sizes),
        uploaded(numbers, like.device, like.dtype).split([part.size for part in numbers]),
        uploaded(weights, like.device, like.dtype).split(padded),
    )
    made = (
        _Piece(rows, piece.augmentation.operation, uniform.view(len(rows), -1), weight)
        for piece, rows, uniform, weight in zip(flat, *columns, strict=True)
    )
    return [list(islice(made, len(pieces))) for pieces in cut]


class _Block:
    """Pieces (parts of minibatches) that are augmented together: all pieces with the same operation in one call.

    The augmentation is also differentiated in one call for each operation. No operation mixes images. So on a CPU every
    image and every gradient has the same bits as if each piece had been augmented alone.
    """

    def __init__(self, synthetic: SyntheticSet, pieces: Sequence[_Piece], functions: StudentStepFunctions) -> None:
        """Augment the images of all pieces (parts of minibatches)."""
        self._pieces = pieces
        numbers = range(len(pieces))
        self._groups = [
            [number for number in numbers if pieces[number].operation == operation]
            for operation in dict.fromkeys(piece.operation for piece in pieces)
        ]
        with torch.enable_grad():
            self._raw = [synthetic.images[self._rows(group)].requires_grad_() for group in self._groups]
            self._augmented = [
                apply_operation(raw, pieces[group[0]].operation, _joined([pieces[number].uniform for number in group]))
                for raw, group in zip(self._raw, self._groups, strict=True)
            ]
        self.images = self._split([functions.layout(each.detach()) for each in self._augmented])
        """[b c h w] augmented images of each piece (part of a minibatch), in the memory order of the step functions."""
        sizes = [len(piece.rows) for piece in pieces]
        self.soft_labels = synthetic.soft_labels[self._rows(numbers)].split(sizes)
        """[b k] soft labels of each piece (part of a minibatch)."""
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def collect(self, number: int, d_x: Tensor, d_y: Tensor) -> bool:
        """Keep the gradients of one piece. Returns True once the gradients of all pieces of the block are kept.

        The pieces are the parts of minibatches that the block has augmented together.

        Args:
            number: number of the piece in the block.
            d_x: gradient with respect to the piece's augmented images.
            d_y: gradient with respect to the piece's soft labels.
        """
        self._gradients[number] = d_x, d_y
        return len(self._gradients) == len(self._pieces)

    def add_to(self, images: Tensor, soft_labels: Tensor) -> None:
        """Pass the collected gradients back through the augmentation, and add them to the class shard's, in place.

        They are added in the order in which they were collected.

        Args:
            images: [n c h w] gradient with respect to the shard's images.
            soft_labels: [n k] gradient with respect to the shard's soft labels.
        """
        along = [_joined([self._gradients[number][0] for number in group]) for group in self._groups]
        d_images = self._split(torch.autograd.grad(self._augmented, self._raw, along))
        rows = self._rows(self._gradients)
        _add_rows(images, rows, _joined([d_images[number] for number in self._gradients]))
        _add_rows(soft_labels, rows, _joined([d_y for _, d_y in self._gradients.values()]))

    def _rows(self, numbers: Iterable[int]) -> Tensor:
        return _joined([self._pieces[number].rows for number in numbers])

    def _split(self, of_groups: Sequence[Tensor]) -> list[Tensor]:
        """Cut tensors into pieces (parts of minibatches), and return these in the order of the pieces.

        Each of the tensors holds all pieces with one augmentation operation.
        """
        parts: dict[int, Tensor] = {}
        for whole, group in zip(of_groups, self._groups, strict=True):
            parts |= dict(zip(group, whole.split([len(self._pieces[number].rows) for number in group]), strict=True))
        return [parts[number] for number in range(len(self._pieces))]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors along dimension 0; a single tensor is returned as it is."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add `values` [m ...] to the rows `rows` [m] of `total`, in place and in order. Rows may come repeatedly."""
    if total.device.type == "cpu":
        total.index_add_(0, rows, values)
    else:  # On a GPU index_add_ adds in no fixed order, and index_put_ sorts the rows first. On a CPU neither is so.
        total.index_put_((rows,), values, accumulate=True)


def _images_of_a_block(images: Tensor) -> int:
    """Largest number of images in pieces (parts of minibatches) augmented together; 0 if each piece is augmented alone.

    Of the tensor `images` [n c h w], only the size of an image, the type and the device are read.
    """
    numbers = images.shape[1:].numel()
    if images.device.type != "cpu":
        return BLOCK_BYTES // (numbers * images.element_size())
    return CPU_BLOCK_BYTES // (numbers * images.element_size()) if numbers < CPU_DIVIDED_SUM else 0


def block_bytes(images: int, steps: int, size: int) -> int:
    """Estimated bytes of GPU memory for the student steps that are augmented together; 0 if each is augmented alone.

    Args:
        images: number of images of a step's minibatch.
        steps: number of student steps.
        size: bytes of an image.
    """
    together = min(steps, BLOCK_BYTES // size // images)  # only whole steps share a block
    return BLOCK_COPIES * together * images * size


def _blocks(steps: Sequence[range], sizes: Sequence[int], most: int) -> list[range]:
    """Group pieces (parts of minibatches) into blocks, which are augmented together.

    A block has consecutive whole steps with at most `most` images, or one piece of a larger step.

    Args:
        steps: numbers of the pieces of each step.
        sizes: number of images of each piece.

    Returns:
        For each piece, the block that the piece is in, as the range of the numbers of all pieces in this block.
    """
    blocks, held = [range(0)], 0
    for step in steps:
        images = sum(sizes[number] for number in step)
        if images > most:
            blocks += [range(number, number + 1) for number in step]
        elif held + images <= most:
            blocks[-1] = range(blocks[-1].start, step.stop)
            images += held
        else:
            blocks.append(step)
        held = images
    return [block for block in blocks for _ in block]


class _Sweep:
    """Runner of the student's steps: calls the step functions for each minibatch, at most `chunk` images at a time."""

    def __init__(self, functions: StudentStepFunctions, synthetic: SyntheticSet, steps: PlacedSteps) -> None:
        self._functions, self._synthetic = functions, synthetic
        self._pieces = [piece for pieces in steps for piece in pieces]
        ends = accumulate(map(len, steps))
        self._of_step = [range(end - len(pieces), end) for end, pieces in zip(ends, steps, strict=True)]
        sizes = [len(piece.rows) for piece in self._pieces]
        self._block_of = _blocks(self._of_step, sizes, _images_of_a_block(synthetic.images))
        self._held: tuple[range, _Block] | None = None

    def student_gradient(self, theta: Tensor, step: int) -> Tensor:
        """Compute the part [p] of the student's gradient in step `step` that comes from this class shard's images."""
        total = torch.zeros_like(theta)
        for number in self._of_step[step]:
            total += self._functions.forward(theta, *self._filled_up(number))
        return total

    def reverse(self, theta: Tensor, step: int, v: Tensor, images: Tensor, soft_labels: Tensor) -> Tensor:
        """Differentiate s_i = <v, g_i> for student step i on this shard's images; g_i is the student's gradient.

        Returns one vector [p + 1]: the derivative of s_i with respect to `theta`, then s_i. Derivatives with respect to
        images and soft labels are kept until those of a whole block (steps augmented together) are complete. They are
        then added to `images` [n c h w] and `soft_labels` [n k] in place.
        """
        total = theta.new_zeros(len(theta) + 1)
        for number in self._of_step[step]:
            s, d_theta, d_x, d_y = self._functions.reverse(theta, *self._filled_up(number), v)
            total[:-1] += d_theta
            total[-1] += s
            block, size = self._block(number), len(self._pieces[number].rows)
            if block.collect(number - self._block_of[number].start, d_x[:size], d_y[:size]):
                block.add_to(images, soft_labels)
                self._held = None
        return total

    def _block(self, number: int) -> _Block:
        """Block that holds a piece (part of a minibatch). Its pieces are augmented when the first of them is needed.

        Only the latest block is in memory.
        """
        numbers = self._block_of[number]
        if self._held is None or self._held[0] != numbers:
            self._held = None  # frees its memory
            pieces = self._pieces[numbers.start : numbers.stop]
            self._held = numbers, _Block(self._synthetic, pieces, self._functions)
        return self._held[1]

    def _filled_up(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, soft labels and weights of a piece (part of a minibatch), padded to the chunk size.

        The padding is images of weight 0.
        """
        block, place, weights = self._block(number), number - self._block_of[number].start, self._pieces[number].weights
        x, y = block.images[place], block.soft_labels[place]
        if missing := len(weights) - len(x):  # padding by nothing would copy
            x, y = pad(x, (0, 0) * 3 + (0, missing)), pad(y, (0, 0, 0, missing))
        return x, y, weights
