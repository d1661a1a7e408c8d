"""Compiled kernels beside a saved plan, and back into Triton's cache where the program is loaded.

``kernels/manifest.json`` names Triton's version, the architecture, and for each kernel the key and the files
of its group in Triton's cache; the files lie beside it. Their digests stand in ``plan.json`` with those of
the plan's other files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from graphwright.ir.errors import PlanError
from graphwright.kernels.triton.ahead import CompileError, install, triton_version
from graphwright.optimizer.compiled_kernels import CompiledKernels
from graphwright.optimizer.report import Decision, Status

MANIFEST = "kernels/manifest.json"


def kernel_files(compiled: CompiledKernels | None) -> dict[str, bytes]:
    """What a saved plan holds of compiled kernels, by path; nothing if there are none."""
    usable = {} if compiled is None else {made.key: made for made in compiled.kernels if not made.error}
    if compiled is None or not usable:
        return {}
    files: dict[str, bytes] = {}
    entries = []
    for key, made in sorted(usable.items()):
        group = {f"{made.name}.{made.kind}": f"kernels/{key}.{made.kind}"}
        group[f"{made.name}.json"] = f"kernels/{key}.json"
        files[f"kernels/{key}.{made.kind}"] = made.binary
        files[f"kernels/{key}.json"] = made.metadata.encode()
        entries.append({"key": key, "name": made.name, "label": made.label, "files": group})
    manifest = {
        "target": compiled.target, "arch": compiled.arch, "triton": compiled.triton, "kernels": entries,
    }  # fmt: skip
    return {MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode(), **files}


def install_kernels(files: Mapping[str, bytes], where: str) -> list[Decision]:
    """Put saved kernels where Triton's just-in-time compiler looks first.

    Args:
        files: by path, as :func:`kernel_files` made them, and checked against their digests.
        where: the saved plan.

    Returns:
        A decision that says so if they cannot be used here.

    Raises:
        PlanError: the manifest is malformed.
    """
    if MANIFEST not in files:
        return []
    try:
        manifest = json.loads(files[MANIFEST])
        made_with, target = manifest["triton"], manifest["target"]
        groups = [
            (k["key"], k["name"], {name: files[path] for name, path in k["files"].items()})
            for k in manifest["kernels"]
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PlanError(
            f"the manifest of the saved kernels is malformed: {error!r}",
            where=f"{where}/{MANIFEST}",
            hint="optimize the model again, and save the result to another folder",
        ) from error
    try:
        version = triton_version()
    except CompileError as error:
        return [_unused(target, error.what)]
    if version != made_with:
        return [_unused(target, f"they were compiled by Triton {made_with}, this is Triton {version}")]
    try:
        for key, name, group in groups:
            install(key, name, group)
    except OSError as error:
        return [_unused(target, f"Triton's cache cannot be written: {error}")]
    return []


def _unused(target: str, reason: str) -> Decision:
    text = f"the saved kernels for {target} are not used, they are compiled when needed: {reason}"
    return Decision("compile kernels", "", Status.FALLBACK, text, None, None, "exact")
