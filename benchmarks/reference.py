"""A plain implementation of RLEdit's training step, with which the package's speed and results are compared.

Every loss runs the whole model in mini-batches of four and computes logits at all positions. The divergence from θ₀
runs the unedited model again. Each component and each backtracked batch has its own forward passes. The update solves
a d_in × d_in system and is a dense matrix. Nothing is cached. The formulas are MALMEN's and RLEdit's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import Hypernetwork
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.forward import Passage
from rledit_env.reward import RewardConfig
from rledit_env.scoring import ScoredBatch


@dataclass(frozen=True)
class Scored:
    """The loss of a step, which is the negative reward without regularisation, and its gradient.

    Attributes:
        loss: Σ_batches weight · Σ_components weight · mean.
        gradient: module → gradient of the loss with respect to its weight (d_out, d_in).
    """

    loss: float
    gradient: dict[str, Tensor]


class Reference:
    """The plain implementation. It uses the Hugging Face model of an `EditableLM` and changes its weights directly.

    Args:
        lm: gives the model and the names of the edited modules; loaded with ``optimize=False``.
        mini_batch: passages in a forward pass.
        solve_in: precision of the normal equations. In float32 they lose terms below 1e-7 of ‖u‖²; for wide modules
            the damping is one of them.
    """

    def __init__(self, lm: EditableLM, mini_batch: int = 4, solve_in: torch.dtype = torch.float32) -> None:
        self.lm, self.model, self.mini_batch, self.solve_in = lm, lm.model, mini_batch, solve_in
        self.modules: dict[str, Any] = {name: lm.model.get_submodule(name) for name in lm.module_shapes}

    def _logits(self, passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
        """Logits (b, L, |V|), and labels (b, L): the target, or −100 at positions that are not scored."""
        length = max(map(len, passages))
        ids, mask = torch.zeros(2, len(passages), length, dtype=torch.long)
        labels = torch.full((len(passages), length), -100)
        for row, passage in enumerate(passages):
            ids[row, : len(passage)] = torch.tensor(passage.input_ids)
            mask[row, : len(passage)] = 1
            labels[row, list(passage.positions)] = torch.tensor(passage.targets)
        device = self.lm.device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        return output.logits.float(), labels.to(device)

    def _mini_batches(self, passages: Sequence[Passage]) -> Iterator[Sequence[Passage]]:
        for start in range(0, len(passages), self.mini_batch):
            yield passages[start : start + self.mini_batch]

    def trace(self, passages: Sequence[Passage]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keys (N, d_in) and value gradients (N, d_out) by module at the answer positions."""
        total = sum(len(p.targets) for p in passages)
        keys: dict[str, list[Tensor]] = {m: [] for m in self.modules}
        gradients: dict[str, list[Tensor]] = {m: [] for m in self.modules}
        recorded: dict[str, tuple[Tensor, Tensor]] = {}  # module → its inputs and outputs

        def recorder(name: str) -> Any:
            def hook(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                output.retain_grad() if output.requires_grad else output.requires_grad_()
                recorded[name] = (inputs[0].detach(), output)

            return hook

        handles = [module.register_forward_hook(recorder(name)) for name, module in self.modules.items()]
        for members in self._mini_batches(passages):
            logits, labels = self._logits(members)
            (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total).backward()
            for name, (inputs, output) in recorded.items():
                assert output.grad is not None
                keys[name].append(inputs[labels != -100].float())
                gradients[name].append(output.grad[labels != -100].float())
        for handle in handles:
            handle.remove()
        return {m: torch.cat(rows) for m, rows in keys.items()}, {m: torch.cat(rows) for m, rows in gradients.items()}

    def update(
        self, network: Hypernetwork, keys: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Dense ΔW (d_out, d_in) by module, by the normal equations of least squares.

        ΔW is differentiable with respect to the network's parameters.
        """
        updates = {}
        record = network.observe(keys, gradients)
        for module, u in keys.items():
            group = next(g for g, members in network.groups.items() if module in members)
            member, blocks = network.groups[group].index(module), network.networks[group]
            z = record.inputs[group][member]
            for down, up, bias, scale, shift in zip(
                blocks.down, blocks.up, blocks.bias, blocks.scale, blocks.shift, strict=True
            ):
                z = z + scale[member] * (z @ down @ up + bias).clamp(min=0) + shift[member]
            key_part, gradient_part = z.split(network.shapes[module], dim=1)
            step_size, damping = (p[network.index[module]].exp() for p in (network.log_step_size, network.log_damping))
            v = -step_size * (u * key_part).sum(1, keepdim=True) * gradient_part  # (N, d_out)
            u, v = u.to(self.solve_in), v.to(self.solve_in)
            system = u.T @ u + damping * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)  # (d_in, d_in)
            updates[module] = torch.linalg.solve(system, u.T @ v).T.float()
        return updates

    @torch.no_grad()
    def apply(self, updates: Mapping[str, Tensor]) -> None:
        """W ← W + ΔW."""
        for name, module in self.modules.items():
            update = updates[name].detach()
            module.weight += (update.T if isinstance(module, Conv1D) else update).to(module.weight.dtype)

    def score(self, batches: Sequence[ScoredBatch], config: RewardConfig) -> Scored:
        """The losses of batches at the current weights, and the gradient of their sum."""
        total = 0.0
        for module in self.modules.values():
            module.weight.requires_grad_()
        for batch in batches:
            for weight, component in config.components.values():
                pairs = zip(batch.records, batch.choices, strict=True)
                passages = [p for record, choice in pairs for p in component.passages(record, choice)]
                tokens = sum(len(p.targets) for p in passages)
                for members in self._mini_batches(passages):
                    logits, labels = self._logits(members)
                    if component.needs_reference:
                        with torch.no_grad(), self.lm.original_weights():
                            original = self._logits(members)[0].log_softmax(-1)
                        divergence = F.kl_div(logits.log_softmax(-1), original, log_target=True, reduction="none")
                        loss = divergence.sum(-1)[labels != -100].sum()
                    else:
                        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                    loss = loss * (batch.weight * weight / tokens)
                    loss.backward()
                    total += float(loss.detach())
        gradient = {}
        for name, module in self.modules.items():
            assert module.weight.grad is not None
            gradient[name] = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
            module.weight.grad = None
            module.weight.requires_grad_(False)
        return Scored(total, gradient)

    def training_step(
        self, network: Hypernetwork, edits: Sequence[Passage], batches: Sequence[ScoredBatch], config: RewardConfig
    ) -> tuple[dict[str, Tensor], Scored, list[Tensor]]:
        """A training step: state, action, transition, reward, and gradient of the network.

        Returns:
            ΔW, the loss with its gradient, and the gradient of the loss for every trained parameter of the network.
        """
        updates = self.update(network, *self.trace(edits))
        self.apply(updates)
        scored = self.score(batches, config)
        parameters = [p for p in network.parameters() if p.requires_grad]
        credit = [scored.gradient[m].to(update.dtype) for m, update in updates.items()]
        return updates, scored, list(torch.autograd.grad(list(updates.values()), parameters, credit))
