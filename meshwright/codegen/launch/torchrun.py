"""torchrun on one node or several, by hand or under Slurm."""

from __future__ import annotations

import re
from importlib.resources import files

import jinja2

from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError

ALLOCATOR = (
    "# memory segments that grow fragment less; the plan's memory counts on them",
    "export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}",
)
INTERPRETER = ("# without a GPU the kernels run in Triton's interpreter", "export TRITON_INTERPRET=1")


def launcher(plan: Plan) -> str:
    """The text of launch.sh: torchrun on one node or several. InputError where nodes have unequal numbers of devices."""
    interpreted = INTERPRETER if plan.solution.kernels and plan.cluster.device.kind == "cpu" else ()
    return start_script(plan, "launch.sh", "train.py", '"$here/train.py" "$@"', "bash launch.sh --steps 20", (*ALLOCATOR, *interpreted))


def start_script(plan: Plan, name: str, what: str, program: str, example: str, lines: tuple[str, ...] = ()) -> str:
    """A bash script `name` that starts `program`, words for torchrun, on every rank of the plan; `lines` come before it. Same errors."""
    nodes, per_node = shape(plan, name)
    return template("launch.sh.jinja").render(
        nodes=nodes, per_node=per_node, devices=plan.layout.devices, name=name, what=what, program=program, example=example, lines=lines,
    )  # fmt: skip


def slurm(plan: Plan, script: str = "launch.sh") -> str:
    """The text of slurm.sh, for sbatch: `script` once on every node, which starts that node's ranks. InputError as for launcher."""
    nodes, per_node = shape(plan, "slurm.sh")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", plan.model.name) or "train"
    return template("slurm.sh.jinja").render(
        nodes=nodes, per_node=per_node, devices=plan.layout.devices, job=name, script=script, gpus=plan.cluster.device.kind == "cuda",
    )  # fmt: skip


def shape(plan: Plan, what: str) -> tuple[int, int]:
    """Nodes, and devices of each. InputError where these differ between nodes."""
    counts = sorted({n.devices for n in plan.cluster.nodes})
    if len(counts) > 1:
        listed = " and ".join(str(c) for c in counts)
        raise InputError(f"{what} needs nodes with equal numbers of devices; those of {plan.cluster.name} have {listed}")
    return plan.layout.devices // counts[0], counts[0]


def template(name: str) -> jinja2.Template:
    """One of the templates of codegen."""
    text = (files("meshwright.codegen") / "templates" / name).read_text()
    return jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
