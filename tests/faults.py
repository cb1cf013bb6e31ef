"""Deliberate faults, at least one a module, that the default tests must notice: `python tests/faults.py [NAME ...]`.

Each fault is a text that occurs exactly once in a file (tests/test_suite.py checks that) and another in its place. The
script makes the change in a copy of the tracked files, runs the tests named beside it as `make test` would, and says
whether they failed. docs/testing.md lists them.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Fault(NamedTuple):
    """What is wrong, in which file, the text and what stands in its place, and the arguments of the pytest that notices."""

    name: str
    path: str
    text: str
    instead: str
    tests: str


FAULTS = (
    Fault(
        "model: the biases of q, k and v are not added",
        "dream_jax/model.py",
        "return y if self.bias is None else jnp.add(y, self.bias[...])",
        "return y",
        "tests/test_model.py -k every_parameter_matters",
    ),
    Fault(
        "model: the rotation turns the wrong way",
        "dream_jax/model.py",
        "second * cos + first * sin",
        "second * cos - first * sin",
        "tests/test_model.py -k rotary",
    ),
    Fault(
        "attention: scores are not scaled by the width of a head",
        "dream_jax/attention/xla.py",
        "scale = q_BTNH.shape[-1] ** -0.5",
        "scale = 1.0",
        "tests/test_attention.py",
    ),
    Fault(
        "masks: causal the other way round",
        "dream_jax/masks/order.py",
        "return _keys(num_keys) <= ",
        "return _keys(num_keys) >= ",
        "tests/test_masks.py -k drawing",
    ),
    Fault(
        "masks: padding is seen and tokens are hidden",
        "dream_jax/masks/rows.py",
        "return jnp.asarray(self.valid_BS)[:, None, :]",
        "return ~jnp.asarray(self.valid_BS)[:, None, :]",
        "tests/test_masks.py -k padding",
    ),
    Fault(
        "objective: the right shift is missing",
        "dream_jax/objective.py",
        "jnp.where(index_SC % length == 0, index_SC, index_SC - 1)",
        "index_SC",
        "tests/test_objective.py -k test_loss",
    ),
    Fault(
        "objective: the sum is divided by all positions, not by the masked ones",
        "dream_jax/objective.py",
        "return total / denominator, aux",
        "return total / masked_BT.size, aux",
        "tests/test_objective.py -k test_loss",
    ),
    Fault(
        "objective: CART's weight counts both sides in full",
        "dream_jax/objective.py",
        "return 0.5 * self.geometric_p * (",
        "return self.geometric_p * (",
        "tests/test_objective.py -k test_weights",
    ),
    Fault(
        "train step: the denominator is that of a microbatch's rows",
        "dream_jax/train_step.py",
        "normalizer = jnp.maximum(jnp.sum(masked_BT, dtype=jnp.float32), 1.0)",
        "normalizer = jnp.float32(masked_BT.size)",
        "tests/test_train_step.py -k adamw_by_hand",
    ),
    Fault(
        "schedule: counts are rounded, not cut off",
        "dream_jax/schedule.py",
        "jnp.floor(",
        "jnp.round(",
        "tests/test_schedule.py -k counts",
    ),
    Fault(
        "decoding: the least confident first",
        "dream_jax/decoding/choosing.py",
        "jnp.lexsort((-confidence_BM",
        "jnp.lexsort((confidence_BM",
        "tests/test_decoding.py -k commit",
    ),
    Fault(
        "sampler: a token is predicted from its own position",
        "dream_jax/sampler/loop.py",
        "position_BM, position_BM - 1)",
        "position_BM, position_BM)",
        "tests/test_sampler.py -k published_trajectory",
    ),
    Fault(
        "sampler: a full pass comes one pass late",
        "dream_jax/sampler/loop.py",
        "state.passes_since_full_B >= cache.refresh_passes",
        "state.passes_since_full_B > cache.refresh_passes",
        "tests/test_sampler_blocks.py -k full_pass_every_time",
    ),
    Fault(
        "sampler: a confidence equal to the threshold is not enough",
        "dream_jax/sampler/rules.py",
        "return sorted_BM >= value\n",
        "return sorted_BM > value\n",
        "tests/test_sampler_blocks.py -k at_the_threshold",
    ),
    Fault(
        "sharding: two axes of a kernel are swapped",
        "dream_jax/sharding.py",
        '"layers.mlp.down.kernel": ("layers", "mlp", "embed")',
        '"layers.mlp.down.kernel": ("layers", "embed", "mlp")',
        "tests/test_sharding.py",
    ),
    Fault(
        "optimizer: int8 moments are rounded to nearest, so that small steps are lost",
        "dream_jax/optimizer/codes.py",
        "_blocks(noise) * (above - below)",
        "0.5 * (above - below)",
        "tests/test_optimizer.py -k no_bias",
    ),
    Fault(
        "lora: the correction is not divided by the rank",
        "dream_jax/lora.py",
        "linear.lora_alpha / rank * jnp.matmul",
        "linear.lora_alpha * jnp.matmul",
        "tests/test_lora.py -k merged_is",
    ),
    Fault(
        "quantisation: one scale for a row, not for each block of it",
        "dream_jax/quantisation.py",
        "scales = jnp.max(jnp.abs(blocks), axis=-1)",
        "scales = jnp.broadcast_to(jnp.max(jnp.abs(blocks), axis=(-2, -1))[..., None], blocks.shape[:-1])",
        "tests/test_quantisation.py",
    ),
    Fault(
        "hf: a kernel is exported without being transposed",
        "dream_jax/hf/table.py",
        "return flat.T if self.transposed else flat",
        "return flat",
        "tests/test_hf.py -k inverse",
    ),
    Fault(
        "tokenizer: the mask token is another special token",
        "dream_jax/tokenizer.py",
        "    mask_id = 260\n",
        "    mask_id = 259\n",
        "tests/test_tokenizer.py -k byte_ids",
    ),
    Fault(
        "tokenizer: the turn that is to be written is the user's",
        "dream_jax/tokenizer.py",
        'ids += [self.im_start_id, *b"assistant\\n"]',
        'ids += [self.im_start_id, *b"user\\n"]',
        "tests/test_tokenizer.py -k byte_chat",
    ),
    Fault(
        "data: one end-of-text token too many",
        "dream_jax/data/layout.py",
        "self._lengths.response[rows] + self._options.eos_tail",
        "self._lengths.response[rows] + self._options.eos_tail + 1",
        "tests/test_batches.py -k eos_tail",
    ),
    Fault(
        "data: a row ends without its end token",
        "dream_jax/data/encode.py",
        'pieces.append(("end", [tokenizer.eos_id]))',
        'pieces.append(("end", []))',
        "tests/test_data.py -k encode_raw_row",
    ),
    Fault(
        "checkpoints: checksums are not compared",
        "dream_jax/files.py",
        "return None if found == checksum else",
        "return None if True else",
        "tests/test_checkpoint.py -k damaged_newest_step",
    ),
    Fault(
        "trainer: a run that is resumed begins its data anew",
        "dream_jax/trainer/steps.py",
        'run.batches.set_state(meta["data"])',
        "pass",
        "tests/test_trainer.py -k with_an_unfinished_run",
    ),
    Fault(
        "trainer: the cost is that of the last segment only",
        "dream_jax/trainer/cost.py",
        "chip_hours = sum(hours)",
        "chip_hours = hours[-1]",
        "tests/test_run_report.py -k cost_of_a_run",
    ),
    Fault(
        "evaluation: the interval is one of 90 %, not of 95 %",
        "dream_jax/evaluation/statistics.py",
        "scipy.stats.norm.ppf(0.975)",
        "scipy.stats.norm.ppf(0.95)",
        "tests/test_evaluation_statistics.py -k wilson",
    ),
    Fault(
        "inference: an answer is cut off one token early",
        "dream_jax/inference.py",
        "tokens_to_end=int(np.argmax(is_end)) if",
        "tokens_to_end=int(np.argmax(is_end)) - 1 if",
        "tests/test_inference.py -k end_at_the_end_token",
    ),
    Fault(
        "evaluation: the first number of an answer counts, not the last",
        "dream_jax/evaluation/gsm8k.py",
        "_value(numbers[-1])",
        "_value(numbers[0])",
        "tests/test_evaluation_judges.py -k test_numbers",
    ),
    Fault(
        "plan: the work of attention is forgotten",
        "dream_jax/plan/arithmetic.py",
        "(products + attention + head)",
        "(products + head)",
        "tests/test_plan.py -k flops_of_a_token",
    ),
    Fault(
        "flops: the work of an adapter is forgotten",
        "dream_jax/flops.py",
        "matrices = each * layers + 6 * adapter",
        "matrices = each * layers",
        "tests/test_adapters.py -k no_gradient_of_its_own",
    ),
)


def wrong_places(root: pathlib.Path) -> list[str]:
    """The faults whose text does not stand exactly once in its file, with how often it does."""
    found = []
    for fault in FAULTS:
        path = root / fault.path
        count = path.read_text().count(fault.text) if path.is_file() else 0
        if count != 1:
            found.append(f"{fault.path} holds {fault.text!r} {count} times ({fault.name})")
    return found


def table() -> str:
    """The table of docs/testing.md."""
    rows = [f"| {fault.name} | `{fault.path}` | `{fault.tests}` |" for fault in FAULTS]
    return "\n".join(["| fault | in | noticed by |", "| --- | --- | --- |", *rows]) + "\n"


def copy_tree(target: pathlib.Path) -> None:
    """The tracked files, as they are on the disk."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def try_out(fault: Fault, tree: pathlib.Path) -> tuple[int, str]:
    """Exit status and last lines of the named tests with this fault in a copy of the tree, which is whole again after."""
    path = tree / fault.path
    content = path.read_text()
    path.write_text(content.replace(fault.text, fault.instead))
    # Compiled programs are shared with the tests of the tree itself: most are the same.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "programs")}
    try:
        done = subprocess.run(
            [*command, *fault.tests.split()], cwd=tree, env=environment, capture_output=True, text=True
        )
    finally:
        path.write_text(content)
    return done.returncode, "\n".join(done.stdout.splitlines()[-3:])


def main() -> int:
    """Prints a line a fault; 0 when each was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; without any, all faults")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--table", action="store_true", help="only print the table of docs/testing.md")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(), end="")
        return 0
    chosen = [one for one in FAULTS if not arguments.names or any(name in one.name for name in arguments.names)]
    if wrong := wrong_places(ROOT):
        print("\n".join(wrong))
        return 2
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for number in range(arguments.jobs):
            trees.put(pathlib.Path(folder) / str(number))
            copy_tree(pathlib.Path(folder) / str(number))

        def visit(fault: Fault) -> tuple[Fault, int, str, float]:
            tree, begun = trees.get(), time.monotonic()
            try:
                return fault, *try_out(fault, tree), time.monotonic() - begun
            finally:
                trees.put(tree)

        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            for fault, code, said, seconds in pool.map(visit, chosen):
                # 1: tests failed. 0: none did. Anything else, 5 (no such test) say, is an error of this list.
                verdict = {0: "NOT CAUGHT", 1: "caught"}.get(code, f"ERROR {code}")
                missed += code != 1
                print(f"{verdict:10}  {fault.name}  [{fault.tests}]  {seconds:.0f} s", flush=True)
                if code != 1:
                    print(said, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
