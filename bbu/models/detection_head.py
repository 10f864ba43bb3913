"""The detection head: a DETR decoder on the student image's own patches and the words of the prompt.

What it sees decides what it can learn, so it is kept narrow: the vision tower's patches of one image (which no
other image reaches) and the embeddings of the instruction's tokens. The language model's deeper states would
carry teachers, and at later positions the answer with its boxes.

Built from published parts: queries proposed by the image itself and boxes refined layer by layer (Zhu et al.,
Deformable DETR, arXiv:2010.04159), queries placed by their boxes (Liu et al., DAB-DETR, arXiv:2201.12329),
attention biased by where a patch lies relative to the query's box, which lets a plain single-scale ViT do without
a pyramid (Lin et al., arXiv:2308.01904), denoising queries (Zhang et al., DINO, arXiv:2203.03605).

Shapes: N samples, P patches, T prompt tokens, Q queries, D width of the head, L layers. Boxes are cxcywh in 0..1 of
the student image.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import nn
from torch.nn import functional as F

from bbu.config.domains import DetectionConfig
from bbu.models.caption_decoder import CaptionDecoder
from bbu.models.denoising import Denoising

EPSILON = 1e-5
TEMPERATURE = 20.0
"""Of the sine embeddings: coordinates lie in 0..1, for which the usual 10,000 would be far too smooth (DAB-DETR)."""


@dataclass(frozen=True)
class HeadSpec:
    """The shape of a head; travels in the checkpoint's config.json, so that its weights find their place again."""

    queries: int
    width: int
    layers: int
    heads: int
    ffn: int
    dropout: float
    adapter_width: int
    language_memory: bool
    caption_layers: int
    caption_dropout: float
    caption_length: int
    prior: float

    @classmethod
    def of(cls, config: DetectionConfig) -> HeadSpec:
        return cls(
            queries=config.detection_num_queries,
            width=config.detection_hidden_dim,
            layers=config.detection_num_layers,
            heads=config.detection_num_heads,
            ffn=config.detection_ffn_dim,
            dropout=config.detection_dropout,
            adapter_width=config.detection_adapter_dim,
            language_memory=config.detection_use_language_memory,
            caption_layers=config.detection_caption_layers,
            caption_dropout=config.detection_caption_dropout,
            caption_length=config.detection_caption_max_length,
            prior=config.detection_prior_prob,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Memory:
    """What the queries may look at. A patch's row and column index the axes' centres."""

    patches: Float[torch.Tensor, "N P C"]
    """states of the vision tower, padded"""
    patch_mask: Bool[torch.Tensor, "N P"]
    """True at real patches"""
    rows: Int[torch.Tensor, "N P"]
    columns: Int[torch.Tensor, "N P"]
    grid: Int[torch.Tensor, "N 2"]
    """rows and columns of each image"""
    words: Float[torch.Tensor, "N T H"]
    """token embeddings of the instruction"""
    word_mask: Bool[torch.Tensor, "N T"]

    @cached_property
    def centres(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres of the columns and of the rows; found once for all layers, since a GPU's host waits for them."""
        return axis_centres(self.grid[:, 1]), axis_centres(self.grid[:, 0])


@dataclass(frozen=True)
class DetectionOutput:
    """What the head says: after the proposals and after each decoder layer, the last one last."""

    boxes: Float32[torch.Tensor, "outputs N Q 4"]
    logits: Float32[torch.Tensor, "outputs N Q"]
    """objectness"""
    valid: Bool[torch.Tensor, "N Q"]
    """an image with fewer patches than queries leaves some queries empty"""
    states: Float[torch.Tensor, "N Q D"]
    """of the last layer, for the captions"""
    denoised_boxes: Float32[torch.Tensor, "L N K 4"] | None = None
    denoised_logits: Float32[torch.Tensor, "L N K"] | None = None


class DetectionHead(nn.Module):
    """Adapters, proposals, decoder, and the branches for boxes, objectness and captions."""

    def __init__(self, spec: HeadSpec, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.vision_adapter = adapter(vision_width, spec.adapter_width, width)
        self.language_adapter = adapter(language_width, spec.adapter_width, width) if spec.language_memory else None
        self.place = mlp(2 * width, width, width)
        self.proposal_box, self.proposal_score = mlp(width, width, 4), nn.Linear(width, 1)
        self.query, self.denoising_query = nn.Linear(width, width), nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(width)
        self.box = nn.ModuleList(mlp(width, width, 4) for _ in range(spec.layers))
        self.objectness = nn.ModuleList(nn.Linear(width, 1) for _ in range(spec.layers))
        self.captions = CaptionDecoder(
            width, language_width, layers=spec.caption_layers, heads=spec.heads, ffn=spec.ffn,
            dropout=spec.caption_dropout, max_length=spec.caption_length,
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights; transformers' own way would erase the prior of the objectness."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.denoising_query, std=0.02)
        nn.init.normal_(self.captions.positions, std=0.02)
        for box in (self.proposal_box, *self.box):  # every layer begins by keeping the box it is given
            nn.init.zeros_(box.get_submodule("2").get_parameter("weight"))
        for score in (self.proposal_score, *self.objectness):
            nn.init.constant_(score.get_parameter("bias"), -math.log((1 - self.spec.prior) / self.spec.prior))

    def forward(self, memory: Memory, denoising: Denoising | None = None) -> DetectionOutput:
        cells = patch_boxes(memory)
        patches = self.vision_adapter(memory.patches.to(self._dtype)) + self._placed(cells)
        boxes, logits, queries, valid = self._propose(memory, patches, cells)
        keys, key_mask = self._keys(memory, patches)
        start = boxes.detach()
        if denoising is not None:
            start = torch.cat([start, denoising.boxes], dim=1)
            extra = self.denoising_query.expand(len(boxes), denoising.boxes.shape[1], -1)
            queries = torch.cat([queries, extra], dim=1)
        refined = self._decode(queries, start, memory, keys, key_mask, attention_between(valid, denoising))
        return self._split(boxes, logits, valid, *refined)

    @property
    def _dtype(self) -> torch.dtype:
        return self.query.weight.dtype

    def _placed(self, boxes: Float32[torch.Tensor, "N Q 4"]) -> Float[torch.Tensor, "N Q D"]:
        """What the place of a box adds to what is there; boxes are float32 also where the weights are not."""
        return self.place(place_of(boxes, self.spec.width).to(self._dtype))

    def _propose(
        self, memory: Memory, patches: Float[torch.Tensor, "N P D"], cells: Float32[torch.Tensor, "N P 4"]
    ) -> tuple[
        Float32[torch.Tensor, "N Q 4"],
        Float32[torch.Tensor, "N Q"],
        Float[torch.Tensor, "N Q D"],
        Bool[torch.Tensor, "N Q"],
    ]:
        """The patches that look most like objects become queries, each with a box around itself to start from."""
        anchors = cells * torch.tensor([1, 1, 3, 3], device=patches.device)
        scores = self.proposal_score(patches).float().squeeze(-1).masked_fill(~memory.patch_mask, -1e4)
        missing = max(0, self.spec.queries - scores.shape[1])
        scores = F.pad(scores, (0, missing), value=-1e4)
        logits, chosen = scores.topk(self.spec.queries, dim=1)
        take = chosen.clamp(max=patches.shape[1] - 1)[..., None]
        picked = patches.gather(1, take.expand(-1, -1, patches.shape[-1]))
        anchor = anchors.gather(1, take.expand(-1, -1, 4))
        boxes = shift(anchor, self.proposal_box(picked))
        valid = F.pad(memory.patch_mask, (0, missing), value=False).gather(1, chosen)
        return boxes, logits, self.query(picked), valid

    def _keys(self, memory: Memory, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and, where they are used, words: [N, P (+ T), D] and their mask."""
        if self.language_adapter is None:
            return patches, memory.patch_mask
        words = self.language_adapter(memory.words.to(self._dtype))
        return torch.cat([patches, words], dim=1), torch.cat([memory.patch_mask, memory.word_mask], dim=1)

    def _decode(
        self,
        queries: torch.Tensor,
        boxes: torch.Tensor,
        memory: Memory,
        keys: torch.Tensor,
        key_mask: torch.Tensor,
        own: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Layer by layer; a layer's box is refined from the one before, whose gradient ends there."""
        all_boxes, all_logits = [], []
        states = queries
        for layer, box, objectness in zip(self.layers, self.box, self.objectness, strict=True):
            queries = layer(queries, self._placed(boxes), boxes, own, memory, keys, key_mask)
            states = self.norm(queries)
            refined = shift(boxes, box(states))
            all_boxes.append(refined)
            all_logits.append(objectness(states).float().squeeze(-1))
            boxes = refined.detach()
        return torch.stack(all_boxes), torch.stack(all_logits), states

    def _split(
        self,
        proposed_boxes: torch.Tensor,
        proposed_logits: torch.Tensor,
        valid: torch.Tensor,
        boxes: torch.Tensor,
        logits: torch.Tensor,
        states: torch.Tensor,
    ) -> DetectionOutput:
        """Matching queries to the one side, denoising ones to the other."""
        count = valid.shape[1]
        denoised = boxes.shape[2] > count
        return DetectionOutput(
            boxes=torch.cat([proposed_boxes[None], boxes[:, :, :count]]),
            logits=torch.cat([proposed_logits[None], logits[:, :, :count]]),
            valid=valid,
            states=states[:, :count],
            denoised_boxes=boxes[:, :, count:] if denoised else None,
            denoised_logits=logits[:, :, count:] if denoised else None,
        )


class DecoderLayer(nn.Module):
    """Self-attention among queries, attention to the memory, feed-forward; normalised before each."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        width, self.heads, self.dropout = spec.width, spec.heads, spec.dropout
        self.norm_own, self.norm_memory, self.norm_ffn = (nn.LayerNorm(width) for _ in range(3))
        self.own_qk, self.key_value = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.own_v, self.own_out, self.query, self.out = (nn.Linear(width, width) for _ in range(4))
        self.bias_x, self.bias_y = mlp(2, 32, spec.heads), mlp(2, 32, spec.heads)
        self.drop = nn.Dropout(spec.dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, spec.ffn), nn.GELU(), nn.Dropout(spec.dropout), nn.Linear(spec.ffn, width)
        )

    def forward(
        self,
        queries: Float[torch.Tensor, "N Q D"],
        place: Float[torch.Tensor, "N Q D"],
        boxes: Float32[torch.Tensor, "N Q 4"],
        own: Bool[torch.Tensor, "N 1 Q Q"],
        memory: Memory,
        keys: Float[torch.Tensor, "N K D"],
        key_mask: Bool[torch.Tensor, "N K"],
    ) -> Float[torch.Tensor, "N Q D"]:
        """own: True where a query may look at another."""
        normed = self.norm_own(queries)
        query, key = self.own_qk(normed + place).chunk(2, dim=-1)
        queries = queries + self.drop(self.own_out(self._attend(query, key, self.own_v(normed), own)))
        normed = self.norm_memory(queries)
        key, value = self.key_value(keys).chunk(2, dim=-1)
        bias = self._bias(boxes, memory, keys.shape[1]).masked_fill(~key_mask[:, None, None], float("-inf"))
        queries = queries + self.drop(self.out(self._attend(self.query(normed + place), key, value, bias)))
        return queries + self.drop(self.ffn(self.norm_ffn(queries)))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)

    def _bias(self, boxes: torch.Tensor, memory: Memory, keys: int) -> torch.Tensor:
        """[N, heads, Q, keys]: by the distances of a patch's centre to the box's edges, axis by axis; 0 for words."""
        cx, cy, w, h = boxes.unbind(-1)
        dtype = self.query.weight.dtype
        across, down = memory.centres
        along_x = self.bias_x(edge_distances(cx, w, across).to(dtype))
        along_y = self.bias_y(edge_distances(cy, h, down).to(dtype))
        shape = (-1, boxes.shape[1], -1, self.heads)
        columns, rows = (index[:, None, :, None].expand(shape) for index in (memory.columns, memory.rows))
        bias = along_x.gather(2, columns) + along_y.gather(2, rows)
        return F.pad(bias.permute(0, 3, 1, 2), (0, keys - bias.shape[2]))


def adapter(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """From one of the model's widths to the head's. Normalised first: the vision tower's last states are not."""
    return nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs), nn.LayerNorm(outputs)
    )


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def axis_centres(count: torch.Tensor) -> torch.Tensor:
    """Centres of `count` equal cells in 0..1: [N] -> [N, max]; beyond an image's own count they are above 1."""
    cells = torch.arange(int(count.max()), device=count.device)
    return (cells + 0.5) / count[:, None]


def patch_boxes(memory: Memory) -> Float32[torch.Tensor, "N P 4"]:
    """The cell of each patch."""
    rows, columns = memory.grid.unbind(-1)
    x = (memory.columns + 0.5) / columns[:, None]
    y = (memory.rows + 0.5) / rows[:, None]
    return torch.stack([x, y, *(1 / n[:, None].expand_as(x) for n in (columns, rows))], dim=-1).float()


def edge_distances(centre: torch.Tensor, size: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """[N, Q, cells, 2]: signed distances of the cells to a box's two edges on one axis, on a log scale.

    In units of a sixteenth of the image, where the log bends.
    """
    edges = torch.stack([centre - size / 2, centre + size / 2], dim=-1)
    distance = (cells[:, None, :, None] - edges[:, :, None, :]) * 16
    return distance.sign() * distance.abs().log1p()


def place_of(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Sine embedding of boxes: [..., 4] -> [..., 2 * width], a quarter for each of cx, cy, w, h."""
    half = width // 4
    frequencies = TEMPERATURE ** (torch.arange(half, device=boxes.device, dtype=torch.float32) / half)
    angles = boxes.float()[..., None] * (2 * math.pi) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def shift(boxes: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Move boxes in logit space, where they cannot leave 0..1; in float32, whatever the model computes in."""
    return (torch.logit(boxes.float(), eps=EPSILON) + delta.float()).sigmoid()


def attention_between(valid: torch.Tensor, denoising: Denoising | None) -> torch.Tensor:
    """[N, 1, Q+K, Q+K] bool, True where a query may look at another.

    Empty queries are seen by none but themselves. Denoising queries know boxes of the truth: a matching query may
    not see them, nor may those of another group.
    """
    queries = valid.shape[1]
    seen = valid[:, None, :].expand(-1, queries, -1) | torch.eye(queries, dtype=torch.bool, device=valid.device)
    if denoising is None:
        return seen[:, None]
    extra = denoising.boxes.shape[1]
    same = denoising.group[:, None] == denoising.group[None, :]
    within = (same & denoising.valid[:, None, :]) | torch.eye(extra, dtype=torch.bool, device=valid.device)
    above = torch.cat([seen, seen.new_zeros(len(valid), queries, extra)], dim=2)
    below = torch.cat([valid[:, None, :].expand(-1, extra, -1), within], dim=2)
    return torch.cat([above, below], dim=1)[:, None]
