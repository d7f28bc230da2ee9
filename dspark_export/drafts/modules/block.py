"""A DSpark or DFlash drafter over the contract of :func:`dspark_runtime.bundle.draft_contract.block_contract`.

Context rows only become keys and values. Block rows run through the layers and see the context and all
rows of their block. Head logits get the Markov head's correction slot by slot: it depends on the token drafted before.
Beside the chain of drafted tokens, the most likely texts of the block are followed from slot to slot (:class:`Beams`)
where trees are wanted.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dspark_export.drafts.formats.draft import BlockConfig
from dspark_export.drafts.modules.beams import BeamNodes, Beams
from dspark_export.drafts.modules.choice import Choice, Draws
from dspark_export.drafts.modules.decoder_layer import DraftLayer
from dspark_export.drafts.modules.layers import Linear, Norm, Rotation, Weights, keep, softcapped
from dspark_export.drafts.modules.markov import MarkovHead


class BlockModule(torch.nn.Module):
    """See the module's text.

    Args:
        config: the draft.
        weights: its tensors under DeepSpec's names.
        embedding: the target's, [vocab, hidden], shared.
        head: [draft vocab, hidden]: the target's, shared, or chosen rows of it.
        target_ids: int64 [draft vocab], None where draft ids are the target's.
        candidates: most likely tokens returned per slot, and per text that is followed.
        beams: texts of the block that are followed from slot to slot; 0: there is only the chain.
        markov_topk: the Markov head corrects this many candidates per slot, others cannot be drafted; None for all.
        embedding_scale: what embeddings are multiplied with.
    """

    mask_id: torch.Tensor
    forbidden: torch.Tensor | None
    target_ids: torch.Tensor | None

    def __init__(
        self,
        config: BlockConfig,
        weights: Weights,
        *,
        embedding: torch.Tensor,
        head: torch.Tensor,
        target_ids: torch.Tensor | None,
        candidates: int,
        beams: int,
        markov_topk: int | None,
        embedding_scale: float,
    ) -> None:
        super().__init__()
        self.config, self._candidates, self._scale = config, candidates, embedding_scale
        self._beams = beams
        self._topk = None if markov_topk is None or markov_topk >= len(head) else markov_topk
        layers = config.layers
        keep(self, "embed_tokens.weight", embedding)
        self._head = "embed_tokens.weight" if head is embedding else "lm_head.weight"
        if head is not embedding:
            keep(self, self._head, head)
        self._fc = Linear(self, weights, "fc")
        self._hidden_norm = Norm(self, weights, "hidden_norm", layers.norm_epsilon)
        self._layers = [DraftLayer(self, layers, weights, i) for i in range(layers.count)]
        self._norm = Norm(self, weights, "norm", layers.norm_epsilon)
        self._markov = MarkovHead(self, config, weights, target_ids) if config.markov != "none" else None
        self._confidence = Linear(self, weights, "confidence_head.proj") if config.confidence else None
        self.rotation = Rotation(layers, embedding.dtype)
        mask_id = torch.full((1,), config.mask_token_id)
        self.register_buffer("mask_id", mask_id)
        ids = torch.arange(len(head)) if target_ids is None else target_ids
        never = torch.where(ids == mask_id, float("-inf"), 0.0).to(torch.float32)
        self.register_buffer("forbidden", never if never.any() else None)
        self.register_buffer("target_ids", None if target_ids is None else target_ids[:, None])

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The contract's outputs, then the inner values of :func:`dspark_export.drafts.graphs.block.inner_outputs`."""
        features, feature_positions, anchors, block_positions, mask, write_indices, temperature, uniforms, *past = (
            inputs
        )
        config, count = self.config, features.shape[1]
        context = self._hidden_norm(self._fc(features))
        filler = self.mask_id.expand(anchors.shape[0], config.block - 1)
        embedding = self.get_parameter("embed_tokens.weight")
        x = functional.embedding(torch.cat((anchors[:, None], filler), 1), embedding)
        if self._scale != 1.0:
            x = x * self._scale
        turns = self.rotation(block_positions), self.rotation(torch.cat((feature_positions, block_positions), 1))
        masks = {
            window: self._within(window, mask, block_positions, write_indices, count)
            for window in dict.fromkeys(config.layers.windows)
        }
        present: list[torch.Tensor] = []
        injected: list[torch.Tensor] = []
        for i, layer in enumerate(self._layers):
            rows = layer.input_norm(x)
            found = layer.attend(
                rows,
                torch.cat((context, rows), 1),
                turns,
                masks[config.layers.windows[i]],
                write_indices,
                (past[2 * i], past[2 * i + 1]),
            )
            x = layer.finish(x, found.rows)
            present += [found.present_key, found.present_value]
            injected += [part[:, :, :count].transpose(1, 2) for part in (found.key, found.value)]
        hidden = self._norm(x)[:, config.first_slot :]
        logits = functional.linear(hidden, self.get_parameter(self._head)).float()
        base = softcapped(logits, config.layers.softcap)
        choice, nodes, confidences = self._draft(hidden, base, anchors, temperature, uniforms)
        drafted = (choice.tokens, choice.probs, choice.candidates, choice.candidate_probs, *(nodes or ()))
        return (*drafted, *confidences, *present, context, hidden, base, choice.corrected, *injected)

    def _draft(
        self,
        hidden: torch.Tensor,
        base: torch.Tensor,
        anchors: torch.Tensor,
        temperature: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> tuple[Choice, BeamNodes | None, tuple[torch.Tensor, ...]]:
        """What is drafted, what else is likely if that is wanted, and the confidences if the draft has any."""
        draws, beams = Draws(temperature, uniforms), Beams(self._beams, self._candidates) if self._beams else None
        if self._markov is None:
            choice = draws.at_once(base, self._allowed(base), self._candidates)
            if beams is not None:
                for logits in self._allowed(base).unbind(1):
                    beams.step(logits[:, None])
            return self._in_target_ids(choice), self._nodes(beams), self._confidences(hidden, [])
        prepared, state = self._markov.prepare(hidden), self._markov.start(hidden)
        few = values = outer = None
        if self._topk is not None:
            few = torch.topk(self._allowed(base), self._topk)[1].sort(-1)[0]  # ascending, as the vocabulary is
            values, outer = self._allowed(base).gather(2, few), self._markov.outer_rows(few)
        slots = base.unbind(1)
        previous, markov_rows = anchors[:, None], []
        texts, states, width = previous, state, 1  # the same for every text that is followed
        for slot in range(self.config.drafts):
            row, inner, state = self._markov(previous, prepared[slot], state, slot > 0)
            markov_rows.append(row)
            if few is None or values is None or outer is None:
                corrected = self._markov.corrected(slots[slot], inner)
                previous = draws.step(corrected, self._allowed(corrected), self._candidates)
            else:
                bias = torch.matmul(outer[:, slot], inner[..., None])[..., 0].float()
                corrected = values[:, slot] + bias
                previous = few[:, slot].gather(1, draws.step(corrected, corrected, self._candidates))
            if beams is None:
                continue
            mixing = None if (shared := prepared[slot]) is None else _each(shared, width)
            _, inners, states = self._markov(texts.reshape(-1, 1), mixing, states, slot > 0)
            if few is None or values is None or outer is None:
                wide = self._markov.corrected(_each(slots[slot], width), inners)
                texts, origins = beams.step(self._allowed(_by_text(wide, width)))
            else:
                biases = torch.matmul(_by_text(inners, width), outer[:, slot].transpose(1, 2)).float()
                texts, origins = beams.step(values[:, slot, None] + biases, few[:, slot])
            if states is not None:
                kept = origins[..., None].expand(-1, -1, states.shape[-1])
                states = _by_text(states, width).gather(1, kept).flatten(0, 1)
            width = texts.shape[1]
        choice = draws.finished(self._allowed) if few is None else draws.finished_among(few, base)
        return self._in_target_ids(choice), self._nodes(beams), self._confidences(hidden, markov_rows)

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` [..., draft vocab], -inf for what may not be drafted."""
        return logits if self.forbidden is None else logits + self.forbidden

    def _target_id(self, ids: torch.Tensor) -> torch.Tensor:
        """Target's ids of draft ids of any shape."""
        return ids if self.target_ids is None else functional.embedding(ids, self.target_ids)[..., 0]

    def _nodes(self, beams: Beams | None) -> BeamNodes | None:
        if beams is None:
            return None
        nodes = beams.finished()
        return nodes._replace(tokens=self._target_id(nodes.tokens))

    def _in_target_ids(self, choice: Choice) -> Choice:
        return choice._replace(tokens=self._target_id(choice.tokens), candidates=self._target_id(choice.candidates))

    def _confidences(self, hidden: torch.Tensor, markov_rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self._confidence is None:
            return ()
        if self.config.confidence_with_markov:
            rows = torch.cat(markov_rows, -1).reshape(hidden.shape[0], len(markov_rows), -1)
            hidden = torch.cat((hidden, rows), -1)
        return (self._confidence(hidden)[..., 0].float(),)

    def _within(
        self,
        window: int | None,
        mask: torch.Tensor,
        block_positions: torch.Tensor,
        write_indices: torch.Tensor,
        features: torch.Tensor | int,
    ) -> torch.Tensor:
        """``mask`` for layers of this window; causal inside the block if the draft wants that of them."""
        if window is None:
            return mask
        slots = torch.arange(mask.shape[-1])[None]
        inside = slots - (write_indices[:, None] + features)  # row of the block that occupies a slot
        is_block = (inside >= 0) & (inside < self.config.block)
        held = torch.gather(block_positions, 1, inside.clamp(0, self.config.block - 1))
        keys = torch.where(is_block, held, slots)
        distance = block_positions[:, :, None] - keys[:, None]
        allowed = distance < window
        if self.config.causal_windows:
            allowed = allowed & (distance >= 0)
        return mask & allowed[:, None]


def _each(rows: torch.Tensor, times: int) -> torch.Tensor:
    """Rows [batch, n], each ``times`` times in a row: [batch * times, n]."""
    return rows if times == 1 else rows[:, None].expand(-1, times, -1).flatten(0, 1)


def _by_text(rows: torch.Tensor, texts: int) -> torch.Tensor:
    """Rows [batch * texts, n] as [batch, texts, n]."""
    return rows.reshape(-1, texts, rows.shape[-1])
