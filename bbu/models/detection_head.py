"""The detection head: a DETR decoder that sees the student image's own patches and the words of the prompt.

What the head sees decides what it can learn, so it sees little: the vision tower's patches of one image (which no
other image influences) and the embeddings of the instruction's tokens. The language model's deeper states contain the
teachers and, at later positions, the answer with its boxes.

It is built from published parts:
- the image proposes the queries, and each layer refines the boxes (Deformable DETR, arXiv:2010.04159, two-stage with
  iterative box refinement);
- the query's box is its positional embedding (DAB-DETR, arXiv:2201.12329);
- attention has a bias that depends on where a patch lies relative to the query's box, so that a plain ViT needs no
  feature pyramid (Lin et al., arXiv:2308.01904);
- denoising queries (DINO, arXiv:2203.03605).

Shapes: N samples, P patches of the largest image, T prompt tokens, M = P or P + T keys, Q queries, K denoising queries,
C width of the vision tower, H width of the language model, D width of the head, L decoder layers. Boxes are cxcywh in
0..1 of the student image.
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

_EPSILON = 1e-5
"""Boxes are moved this far from 0 and 1 before the logit, as in Deformable DETR's inverse_sigmoid."""
_TEMPERATURE = 20.0
"""Temperature of the sine embedding, as in DAB-DETR: for coordinates in 0..1 the usual 10,000 is far too smooth."""
_ANCHOR_SCALE = 3
"""Side of a proposal's first box, in patches."""
_MASKED_SCORE = -1e4
"""Objectness logit of padding: below every real score, and still finite, so that gradients stay finite."""
_DISTANCE_SCALE = 16
"""Edge distances are counted in sixteenths of the image, where the log scale changes from linear to logarithmic."""


@dataclass(frozen=True)
class HeadSpec:
    """The shape of a head. A checkpoint's config.json holds it, because the head is built before its weights load."""

    queries: int
    """Queries per image."""
    width: int
    """Width of the decoder."""
    layers: int
    """Decoder layers."""
    heads: int
    """Attention heads of decoder and caption branch."""
    ffn: int
    """Width of the feed-forward blocks."""
    dropout: float
    """Dropout of the decoder."""
    adapter_width: int
    """Hidden width of the input adapters."""
    language_memory: bool
    """Whether the queries see the words of the prompt."""
    caption_layers: int
    """Layers of the caption branch."""
    caption_dropout: float
    """Dropout of the caption branch."""
    caption_length: int
    """Longest caption in tokens, the end token included."""
    prior: float
    """Probability of an object that a new head predicts for every query."""

    @classmethod
    def from_config(cls, config: DetectionConfig) -> HeadSpec:
        """The spec that a config describes."""
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
        """The spec as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Memory:
    """What the queries of N samples may attend to.

    P patches of the largest image, T prompt tokens, C width of the vision tower, H width of the language model.
    """

    patches: Float[torch.Tensor, "N P C"]
    """Last states of the vision tower, padded."""
    patch_mask: Bool[torch.Tensor, "N P"]
    """True at real patches."""
    rows: Int[torch.Tensor, "N P"]
    """Row of each patch in its image's grid."""
    columns: Int[torch.Tensor, "N P"]
    """Column of each patch in its image's grid."""
    grid: Int[torch.Tensor, "N 2"]
    """Numbers of rows and columns of each image, in patches."""
    extent: tuple[int, int]
    """The most rows, and the most columns, of any image."""
    words: Float[torch.Tensor, "N T H"]
    """Token embeddings of the instruction."""
    word_mask: Bool[torch.Tensor, "N T"]
    """True at real tokens."""

    @cached_property
    def centres(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres of the columns, and of the rows, of each image: [N, most columns] and [N, most rows].

        Computed once for all layers.
        """
        rows, columns = self.extent
        return _axis_centres(self.grid[:, 1], columns), _axis_centres(self.grid[:, 0], rows)


@dataclass(frozen=True)
class DetectionOutput:
    """Predictions of the head: those of the proposals first, then those of each of L decoder layers (outputs = L + 1).

    N samples, Q queries, K denoising queries, D width of the head. Boxes are cxcywh in 0..1 of the student image.
    """

    boxes: Float32[torch.Tensor, "outputs N Q 4"]
    """Boxes of the queries."""
    logits: Float32[torch.Tensor, "outputs N Q"]
    """Objectness: logit of the probability that the query has an object."""
    valid: Bool[torch.Tensor, "N Q"]
    """False at padding: an image with fewer patches than queries has fewer queries."""
    states: Float[torch.Tensor, "N Q D"]
    """States of the last layer, which the captions are written from."""
    denoised_boxes: Float32[torch.Tensor, "L N K 4"] | None = None
    """Boxes of the denoising queries, if there are any."""
    denoised_logits: Float32[torch.Tensor, "L N K"] | None = None
    """Objectness of the denoising queries, if there are any."""


class DetectionHead(nn.Module):
    """Adapters, proposals, decoder, and the branches for boxes, objectness and captions."""

    def __init__(self, spec: HeadSpec, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.vision_adapter = _adapter(vision_width, spec.adapter_width, width)
        self.language_adapter = _adapter(language_width, spec.adapter_width, width) if spec.language_memory else None
        self.place = _mlp(2 * width, width, width)
        self.proposal_box, self.proposal_score = _mlp(width, width, 4), nn.Linear(width, 1)
        self.query, self.denoising_query = nn.Linear(width, width), nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(_DecoderLayer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(width)
        self.box = nn.ModuleList(_mlp(width, width, 4) for _ in range(spec.layers))
        self.objectness = nn.ModuleList(nn.Linear(width, 1) for _ in range(spec.layers))
        self.captions = CaptionDecoder(
            width, language_width, layers=spec.caption_layers, heads=spec.heads, ffn=spec.ffn,
            dropout=spec.caption_dropout, max_length=spec.caption_length,
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; transformers' own initialisation would erase the prior of the objectness."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.denoising_query, std=0.02)
        nn.init.normal_(self.captions.positions, std=0.02)
        # A new layer returns the box that it is given: its change of the box is zero.
        for box in (self.proposal_box, *self.box):
            nn.init.zeros_(box.get_submodule("2").get_parameter("weight"))
        # Every query begins with the prior probability of an object (focal loss, arXiv:1708.02002, section 3.3).
        for score in (self.proposal_score, *self.objectness):
            nn.init.constant_(score.get_parameter("bias"), -math.log((1 - self.spec.prior) / self.spec.prior))

    def forward(self, memory: Memory, denoising: Denoising | None = None) -> DetectionOutput:
        """Predict boxes, objectness and states of all queries.

        Args:
            memory: what the queries may attend to.
            denoising: extra queries of the same samples, in training alone.
        """
        cells = _patch_boxes(memory)
        patches = self.vision_adapter(memory.patches.to(self._dtype)) + self._position_of(cells)
        boxes, logits, queries, valid = self._propose(memory, patches, cells)
        keys, key_mask = self._keys(memory, patches)
        # The decoder refines the proposals' boxes, but its gradient does not reach them (Deformable DETR).
        start = boxes.detach()
        if denoising is not None:
            start = torch.cat([start, denoising.boxes], dim=1)
            extra = self.denoising_query.expand(len(boxes), denoising.boxes.shape[1], -1)
            queries = torch.cat([queries, extra], dim=1)
        refined = self._decode(queries, start, memory, keys, key_mask, _self_attention_mask(valid, denoising))
        return self._split(boxes, logits, valid, *refined)

    @property
    def _dtype(self) -> torch.dtype:
        return self.query.weight.dtype

    def _position_of(self, boxes: Float32[torch.Tensor, "N Q 4"]) -> Float[torch.Tensor, "N Q D"]:
        """Positional embedding of boxes; boxes are float32 even where the weights are not."""
        return self.place(_sine_embedding(boxes, self.spec.width).to(self._dtype))

    def _propose(
        self, memory: Memory, patches: Float[torch.Tensor, "N P D"], cells: Float32[torch.Tensor, "N P 4"]
    ) -> tuple[
        Float32[torch.Tensor, "N Q 4"],
        Float32[torch.Tensor, "N Q"],
        Float[torch.Tensor, "N Q D"],
        Bool[torch.Tensor, "N Q"],
    ]:
        """Turn the patches with the highest objectness into queries: their boxes, objectness, states and validity.

        The two-stage scheme of Deformable DETR (arXiv:2010.04159, section 4.2), with the query's state taken from its
        patch.
        """
        # Score every patch. Padding never comes before a real patch.
        scores = self.proposal_score(patches).float().squeeze(-1).masked_fill(~memory.patch_mask, _MASKED_SCORE)
        # An image may have fewer patches than there are queries: add scores of no patch, so that topk has enough.
        missing = max(0, self.spec.queries - scores.shape[1])
        scores = F.pad(scores, (0, missing), value=_MASKED_SCORE)
        logits, chosen = scores.topk(self.spec.queries, dim=1)
        # Those that are no patch read the last one instead; `valid` marks them, so that nothing uses what they read.
        valid = F.pad(memory.patch_mask, (0, missing), value=False).gather(1, chosen)
        index = chosen.clamp(max=patches.shape[1] - 1)[..., None]
        states = patches.gather(1, index.expand(-1, -1, patches.shape[-1]))
        # Each query starts from a box of three patches around its own, which the head then moves.
        anchors = torch.cat([cells[..., :2], cells[..., 2:] * _ANCHOR_SCALE], dim=-1)
        boxes = _refined_boxes(anchors.gather(1, index.expand(-1, -1, 4)), self.proposal_box(states))
        return boxes, logits, self.query(states), valid

    def _keys(self, memory: Memory, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches followed by the prompt's words, if the head uses them: [N, M, D] and their mask [N, M].

        N samples, M = P patches (+ T words), D width of the head.
        """
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
        self_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run all layers: boxes [L, N, Q, 4], objectness [L, N, Q] and the last states [N, Q, D].

        Each layer refines the boxes of the layer before, without sending it a gradient (Deformable DETR). L layers,
        N samples, Q queries (denoising ones included), D width of the head.
        """
        all_boxes, all_logits = [], []
        states = queries
        for layer, box, objectness in zip(self.layers, self.box, self.objectness, strict=True):
            queries = layer(queries, self._position_of(boxes), boxes, self_mask, memory, keys, key_mask)
            states = self.norm(queries)
            refined = _refined_boxes(boxes, box(states))
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
        """Separate the matching queries, which come first, from the denoising queries."""
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


class _DecoderLayer(nn.Module):
    """Self-attention, attention to the memory and feed-forward, each with layer normalisation before it."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        width, self.heads, self.dropout = spec.width, spec.heads, spec.dropout
        self.norm_own, self.norm_memory, self.norm_ffn = (nn.LayerNorm(width) for _ in range(3))
        self.own_qk, self.key_value = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.own_v, self.own_out, self.query, self.out = (nn.Linear(width, width) for _ in range(4))
        self.bias_x, self.bias_y = _mlp(2, 32, spec.heads), _mlp(2, 32, spec.heads)
        self.drop = nn.Dropout(spec.dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, spec.ffn), nn.GELU(), nn.Dropout(spec.dropout), nn.Linear(spec.ffn, width)
        )

    def forward(
        self,
        queries: Float[torch.Tensor, "N Q D"],
        place: Float[torch.Tensor, "N Q D"],
        boxes: Float32[torch.Tensor, "N Q 4"],
        self_mask: Bool[torch.Tensor, "N 1 Q Q"],
        memory: Memory,
        keys: Float[torch.Tensor, "N M D"],
        key_mask: Bool[torch.Tensor, "N M"],
    ) -> Float[torch.Tensor, "N Q D"]:
        """Update the queries' states.

        Args:
            queries: states of Q queries, denoising ones included.
            place: positional embedding of their boxes.
            boxes: their boxes, cxcywh.
            self_mask: True where a query may attend to another.
            memory: where the patches lie.
            keys: M keys of each sample, patches first, then words.
            key_mask: True at real keys.

        Shapes: N samples, D width of the head.
        """
        normed = self.norm_own(queries)
        query, key = self.own_qk(normed + place).chunk(2, dim=-1)
        queries = queries + self.drop(self.own_out(self._attend(query, key, self.own_v(normed), self_mask)))
        normed = self.norm_memory(queries)
        key, value = self.key_value(keys).chunk(2, dim=-1)
        bias = self._bias(boxes, memory, keys.shape[1]).masked_fill(~key_mask[:, None, None], float("-inf"))
        queries = queries + self.drop(self.out(self._attend(self.query(normed + place), key, value, bias)))
        return queries + self.drop(self.ffn(self.norm_ffn(queries)))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """query, result: [N, Q, D]; key, value: [N, M, D]; mask: bool or additive, broadcast to [N, heads, Q, M]."""
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)

    def _bias(self, boxes: torch.Tensor, memory: Memory, keys: int) -> torch.Tensor:
        """Bias of the attention from each query to each key: [N, heads, Q, M], 0 for words.

        It depends on the distances from the patch's centre to the box's edges, and is the sum of one term for each
        axis, so that it is computed once per row and once per column (Lin et al., arXiv:2308.01904). N samples,
        Q queries, M keys.
        """
        cx, cy, w, h = boxes.unbind(-1)
        dtype = self.query.weight.dtype
        across, down = memory.centres
        along_x = self.bias_x(_edge_distances(cx, w, across).to(dtype))
        along_y = self.bias_y(_edge_distances(cy, h, down).to(dtype))
        # Look up the terms of each patch's column and row.
        shape = (-1, boxes.shape[1], -1, self.heads)
        columns, rows = (index[:, None, :, None].expand(shape) for index in (memory.columns, memory.rows))
        bias = along_x.gather(2, columns) + along_y.gather(2, rows)
        return F.pad(bias.permute(0, 3, 1, 2), (0, keys - bias.shape[2]))


def _adapter(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Maps states of the model to the head's width. Normalises them first, because the vision tower does not."""
    return nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs), nn.LayerNorm(outputs)
    )


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a ReLU between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _axis_centres(count: torch.Tensor, most: int) -> torch.Tensor:
    """Centres of `count` equal cells in 0..1: [N] -> [N, most], above 1 beyond an image's count (N images)."""
    cells = torch.arange(most, device=count.device)
    return (cells + 0.5) / count[:, None]


def _patch_boxes(memory: Memory) -> Float32[torch.Tensor, "N P 4"]:
    """The box of each patch, cxcywh in 0..1 of its image (N samples, P patches)."""
    rows, columns = memory.grid.unbind(-1)
    x = (memory.columns + 0.5) / columns[:, None]
    y = (memory.rows + 0.5) / rows[:, None]
    return torch.stack([x, y, *(1 / n[:, None].expand_as(x) for n in (columns, rows))], dim=-1).float()


def _edge_distances(centre: torch.Tensor, size: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Signed distances, on a log scale, from cells to the two edges of each box along one axis: [N, Q, cells, 2].

    Args:
        centre: [N, Q], centres of the boxes.
        size: [N, Q], widths or heights of the boxes.
        cells: [N, cells], centres of the rows or columns.

    Shapes: N samples, Q queries.
    """
    edges = torch.stack([centre - size / 2, centre + size / 2], dim=-1)
    distance = (cells[:, None, :, None] - edges[:, :, None, :]) * _DISTANCE_SCALE
    return distance.sign() * distance.abs().log1p()


def _sine_embedding(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Sine embedding of boxes (DAB-DETR): [..., 4] -> [..., 2 * width], a quarter of it for each of cx, cy, w, h."""
    half = width // 4
    frequencies = _TEMPERATURE ** (torch.arange(half, device=boxes.device, dtype=torch.float32) / half)
    angles = boxes.float()[..., None] * (2 * math.pi) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _refined_boxes(boxes: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Add a change to boxes in logit space, so that they stay in 0..1 (Deformable DETR); always in float32."""
    return (torch.logit(boxes.float(), eps=_EPSILON) + change.float()).sigmoid()


def _self_attention_mask(valid: torch.Tensor, denoising: Denoising | None) -> torch.Tensor:
    """The mask of self-attention: [N, 1, Q+K, Q+K] bool, True where a query (row) may attend to another (column).

    Nothing attends to an empty query but the query itself. Denoising queries contain true boxes: matching queries may
    not attend to them, and neither may denoising queries of another group (DN-DETR, arXiv:2203.01305).

    Args:
        valid: [N, Q] bool, False at empty matching queries.
        denoising: K denoising queries of each sample, if there are any.

    Shapes: N samples, Q matching queries, K denoising queries.
    """
    queries = valid.shape[1]
    among_matching = valid[:, None, :].expand(-1, queries, -1) | _identity(queries, valid.device)
    if denoising is None:
        return among_matching[:, None]
    extra = denoising.boxes.shape[1]
    same_group = denoising.group[:, None] == denoising.group[None, :]
    among_denoising = (same_group & denoising.valid[:, None, :]) | _identity(extra, valid.device)
    # Rows of the matching queries, then rows of the denoising queries, which may attend to the matching ones.
    matching_rows = torch.cat([among_matching, among_matching.new_zeros(len(valid), queries, extra)], dim=2)
    denoising_rows = torch.cat([valid[:, None, :].expand(-1, extra, -1), among_denoising], dim=2)
    return torch.cat([matching_rows, denoising_rows], dim=1)[:, None]


def _identity(size: int, device: torch.device) -> torch.Tensor:
    return torch.eye(size, dtype=torch.bool, device=device)
