"""A rewritten model with its inside on show: kept blocks, retained probability and the inputs of every attention site as graph outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ProbedSite", "SiteFigures", "probe_model", "site_figures", "with_outputs"]


@dataclass(frozen=True)
class ProbedSite:
    """Tensor names of one site of a probed model; `blocks` bool [B, Hq, nQ, nK], `row_cra` float [B, Hq, S]."""

    id: str
    query: str
    key: str
    value: str
    key_mask: str | None
    output: str
    blocks: str
    row_cra: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SiteFigures:
    """One site on one prompt; arrays are [Hq]."""

    density: np.ndarray
    cra_mean: np.ndarray
    cra_min: np.ndarray
    output_error: float
    drift: float


def probe_model(path: Path, *, tap_inputs: bool) -> tuple[bytes, list[ProbedSite]]:
    """The model at `path` with every `SampleAttention` node replaced by its probing twin.

    Args:
        path: a rewritten model; its external data is neither read nor copied.
        tap_inputs: also make query, key, value and output of each site graph outputs, and compute `row_cra`.
    """
    import onnx

    from graph_passes import body
    from graph_passes.op import DOMAIN, OP_TYPE

    model = onnx.load(path, load_external_data=False)
    sites = []
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == OP_TYPE:
            node.op_type = body.PROBE_OP_TYPE
            del node.output[1:]
            site = ProbedSite(
                id=node.name,
                query=node.input[0],
                key=node.input[1],
                value=node.input[2],
                key_mask=node.input[3] if len(node.input) > 3 else None,
                output=node.output[0],
                blocks=f"{node.name}/probe/block_mask",
                row_cra=f"{node.name}/probe/row_cra",
                attributes={a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
            )
            node.output.extend([f"{node.name}/probe/certificate", site.blocks, site.row_cra])
            sites.append(site)
    del model.functions[:]
    body.attach(model)
    outputs = [s.blocks for s in sites]
    if tap_inputs:
        outputs += [name for s in sites for name in (s.query, s.key, s.value, s.output, s.row_cra, *((s.key_mask,) if s.key_mask else ()))]
    return with_outputs(model, outputs).SerializeToString(), sites


def with_outputs(model: Any, names: list[str]) -> Any:
    """Adds tensors to the graph's outputs (type and shape are inferred by the runtime)."""
    import onnx

    present = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present)
    return model


def site_figures(site: ProbedSite, outputs: Any, full_output: np.ndarray | None) -> SiteFigures:
    """Figures of one site from the tapped tensors of one prompt (batch 1).

    Args:
        site: names.
        outputs: name -> array of the probed run.
        full_output: the same site's output [1, Hq, S, Dv] in the original model; None when the original has no tensor of that name.
    """
    import torch

    from graph_passes.op import policy_from_attributes
    from sa_export.torch_attention import attend

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(outputs[name]).astype(np.float32))

    policy = policy_from_attributes(site.attributes)
    q, k, v = tensor(site.query), tensor(site.key), tensor(site.value)
    mask = torch.from_numpy(np.asarray(outputs[site.key_mask]).astype(bool)) if site.key_mask else None
    scale, softcap = float(site.attributes["scale"]), float(site.attributes["softcap"])
    everything = torch.ones((1, q.shape[1], -(-q.shape[2] // policy.block_q), -(-k.shape[2] // policy.block_k)), dtype=torch.bool)
    dense, _, _ = attend(q, k, v, mask, everything, policy, scale=scale, softcap=softcap)
    out = np.asarray(outputs[site.output]).astype(np.float32)
    reference = dense.numpy()
    cra = np.asarray(outputs[site.row_cra])[0]
    return SiteFigures(
        density=pair_density(np.asarray(outputs[site.blocks])[0], q.shape[2], k.shape[2], policy.block_q, policy.block_k),
        cra_mean=cra.mean(-1),
        cra_min=cra.min(-1),
        output_error=_relative(out, reference),
        drift=_relative(out, full_output.astype(np.float32))
        if full_output is not None and full_output.shape == out.shape
        else float("nan"),
    )


def pair_density(blocks: np.ndarray, S: int, T: int, block_q: int, block_k: int) -> np.ndarray:
    """Kept causal pairs / causal pairs of an unpadded prompt, exactly: [Hq] from `blocks` [Hq, nQ, nK]."""
    positions = np.arange(S) + T - S
    first = np.arange(blocks.shape[2]) * block_k
    pairs = np.clip(positions[:, None] + 1 - first[None], 0, np.minimum(block_k, T - first)[None])  # [S, nK] allowed keys of the block
    tiles = np.add.reduceat(pairs, np.arange(0, S, block_q), axis=0)
    return (blocks * tiles[None]).sum((1, 2)) / tiles.sum()


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
