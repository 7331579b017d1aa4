"""Muon in float32, and Muon with AdamW."""

import torch
from torch.optim import AdamW, Muon

from experiments.training.optimizers import MATRIX_RATE_FACTOR, Float32Muon, MuonAdamW, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_near_one():
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24), (32, 32)):
        matrix = torch.randn(shape)
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        result = u.T @ orthogonalize(matrix, COEFFICIENTS, 5) @ v.T
        assert (result - torch.diag(result.diagonal())).abs().max() < 1e-3
        scaled = values / values.norm()  # the closed form: the quintic on each singular value
        for _ in range(5):
            a, b, c = COEFFICIENTS
            scaled = a * scaled + b * scaled**3 + c * scaled**5
        torch.testing.assert_close(result.diagonal(), scaled, atol=1e-3, rtol=0)


def test_float32_muon_steps_as_torchs_muon_within_bfloat16():
    torch.manual_seed(0)
    start, gradients = torch.randn(16, 24), torch.randn(4, 16, 24)
    results = []
    for optimizer_class in (Float32Muon, Muon):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([parameter], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach() - start)
    ours, torchs = results
    assert (ours - torchs).norm() / torchs.norm() < 0.02


def test_muon_adamw_updates_matrices_with_muon_and_the_rest_with_adamw():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 8))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.0, betas=(0.9, 0.98))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        reference = torch.nn.Parameter(before[name].clone())
        reference.grad = parameter.grad
        (
            Muon([reference], lr=0.01 * MATRIX_RATE_FACTOR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            if name == "1.weight"
            else AdamW([reference], lr=0.01, weight_decay=0.0, betas=(0.9, 0.98))
        ).step()
        torch.testing.assert_close(parameter - before[name], reference - before[name], atol=2e-3, rtol=0.05)
