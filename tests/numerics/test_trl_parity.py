"""DPO's and GRPO's losses and gradients against TRL's trainers on the same tensors, where TRL is installed."""

from unittest import mock

import pytest
import torch

from megarlhf.algorithms.advantages import group_relative, leave_one_out
from megarlhf.algorithms.dpo import dpo_loss
from megarlhf.batch import Experience
from megarlhf.engine.terms import PolicyLoss

pytest.importorskip("trl")
ROWS, WIDTH = 6, 10


def ragged_mask(generator):
    """[rows, width - 1] bool: a prompt of two tokens, then responses of 1 to 8."""
    lengths = torch.randint(1, WIDTH - 2, (ROWS, 1), generator=generator)
    position = torch.arange(WIDTH - 1)
    return (position >= 1) & (position < 1 + lengths)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "robust"])
def test_dpo_is_trls(kind):
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(1)
    mask, logprobs = ragged_mask(generator), torch.randn(ROWS, WIDTH - 1, generator=generator)
    logprobs, ref = torch.where(mask, logprobs, 0.0), torch.randn(ROWS, generator=generator)
    ranks, prompt_index = torch.tensor([1, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 2, 0, 1, 2])  # TRL's batch is [chosen, rejected]

    theirs = logprobs.clone().requires_grad_()
    accelerator = mock.MagicMock(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = mock.MagicMock(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
        loss_weights=[1.0], beta=0.1, label_smoothing=0.2, use_weighting=False,
        accelerator=accelerator, model=mock.MagicMock(training=False),
    )  # fmt: skip
    whole = torch.cat([torch.zeros(ROWS, 1, dtype=torch.bool), mask], dim=1).long()
    inputs = {"input_ids": torch.zeros(ROWS, WIDTH, dtype=torch.int64), "completion_mask": whole}
    inputs |= {"ref_chosen_logps": ref[:3], "ref_rejected_logps": ref[3:]}
    others = {"entropy": torch.zeros_like(logprobs), "mean_logits": torch.zeros_like(logprobs), "is_top1": mask}  # for its metrics
    model = mock.MagicMock(return_value=mock.MagicMock(log_probs=theirs, **others))
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)

    ours = logprobs.clone().requires_grad_()
    how = {"kind": "ipo" if kind == "ipo" else "sigmoid", "beta": 0.1, "label_smoothing": 0.0 if kind != "robust" else 0.2}
    total = dpo_loss(ours.sum(dim=1), ref, mask.sum(dim=1), ranks, prompt_index, **how)[0] / 3
    if kind == "robust":  # their unbiased estimate is a multiple of conservative DPO less the loss of the labels turned round
        turned = dpo_loss(ours.sum(dim=1), ref, mask.sum(dim=1), 3 - ranks, prompt_index, kind="sigmoid", beta=0.1)[0] / 3
        total = (total - 2 * 0.2 * turned) / (1 - 2 * 0.2)
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(of, x)[0] for of, x in ((total, ours), (loss, theirs))), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "normalization"), [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "constant")])
def test_grpo_is_trls(kind, normalization):
    from trl.trainer.grpo_trainer import GRPOTrainer

    generator = torch.Generator().manual_seed(2)
    mask = ragged_mask(generator)
    old, noise, ref = torch.randn(3, ROWS, WIDTH - 1, generator=generator)
    logprobs, ref, advantages = old + 0.4 * noise, old + 0.3 * ref, torch.randn(ROWS, generator=generator)

    theirs = logprobs.clone().requires_grad_()
    trainer = mock.MagicMock(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.05, epsilon_low=0.2, epsilon_high=0.3, loss_type=kind, use_vllm=False, max_completion_length=12,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, args=mock.MagicMock(delta=None, use_bias_correction_kl=False),
        model=mock.MagicMock(training=True),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies.return_value = (theirs, torch.zeros_like(theirs), None)
    empty, ids = torch.zeros(ROWS, 0, dtype=torch.int64), torch.zeros(ROWS, WIDTH - 1, dtype=torch.int64)
    inputs = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": ids, "completion_mask": mask.long(), "advantages": advantages}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
    trainer.accelerator.gather = lambda x: x
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)

    batch = Experience(
        tokens=torch.zeros(ROWS, WIDTH, dtype=torch.int64), lengths=torch.full((ROWS,), WIDTH), response_mask=mask, old_logprobs=old,
        ref_logprobs=ref, advantages=advantages[:, None].expand_as(old),
    )  # fmt: skip
    term = PolicyLoss(clip=0.2, clip_high=0.3, kl_coef=0.05, kl_estimator="k3", normalization=normalization, max_len=12)
    ours = logprobs.clone().requires_grad_()
    total = term(torch.stack([ours, torch.zeros_like(ours)]), batch)[0] / term.count(batch)
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(of, x)[0] for of, x in ((total, ours), (loss, theirs))), rtol=1e-5, atol=1e-7)


def test_advantages_are_as_trl_computes_them():
    """Its lines, copied: they stand in the middle of a method that samples. TRL 1.16, grpo_trainer.py and rloo_trainer.py."""
    rewards, k = torch.randn(12, generator=torch.Generator().manual_seed(3)), 4
    mean, std = rewards.view(-1, k).mean(dim=1).repeat_interleave(k), rewards.view(-1, k).std(dim=1).repeat_interleave(k)
    for divide, expected in ((True, (rewards - mean) / (std + 1e-4)), (False, rewards - mean)):
        torch.testing.assert_close(group_relative(rewards, group_size=k, divide_by_std=divide), expected, rtol=1e-5, atol=1e-6)
    grouped = rewards.view(-1, k)
    baselines = (grouped.sum(dim=1, keepdim=True) - grouped) / (k - 1)
    torch.testing.assert_close(leave_one_out(rewards, group_size=k), rewards - baselines.view(-1), rtol=1e-5, atol=1e-6)
