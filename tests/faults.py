"""Makes deliberate faults in the code, which the default tests must notice: `python tests/faults.py [NAME ...]`.

A fault replaces a text that occurs exactly once in a file (tests/test_suite.py checks this) by another text. The script
makes the change in a copy of the tracked files, runs the tests that belong to the fault as `make test` does, and prints
whether they failed. docs/testing.md lists the faults.
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
    """One deliberate fault.

    Attributes:
      name: the module, and what the fault makes wrong.
      path: file that is changed, relative to the repository.
      text: text that is replaced; it occurs exactly once in the file.
      instead: text that replaces it.
      tests: arguments of pytest that select the tests which must fail.
    """

    name: str
    path: str
    text: str
    instead: str
    tests: str


FAULTS = (
    Fault(
        "model: the biases of q, k and v are not added",
        "dream_jax/model.py",
        "*self.out_shape)\n        return y if self.bias is None else jnp.add(y, self.bias[...])",
        "*self.out_shape)\n        return y",
        "tests/test_model.py -k every_parameter_matters",
    ),
    Fault(
        "model: the rotary embedding has a wrong sign",
        "dream_jax/model.py",
        "second * cos + first * sin",
        "second * cos - first * sin",
        "tests/test_model.py -k rotary",
    ),
    Fault(
        "attention: scores are not divided by the square root of the head dimension",
        "dream_jax/attention/xla.py",
        "scale = q_BTNH.shape[-1] ** -0.5",
        "scale = 1.0",
        "tests/test_attention.py",
    ),
    Fault(
        "masks: a causal mask shows later tokens, not earlier ones",
        "dream_jax/masks/order.py",
        "return key_indices(num_keys) <= ",
        "return key_indices(num_keys) >= ",
        "tests/test_masks.py -k drawing",
    ),
    Fault(
        "masks: padding may be attended to, and valid tokens are hidden",
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
        "objective: CART's weight counts the tokens of both sides in full",
        "dream_jax/objective.py",
        "return 0.5 * self.geometric_p * (",
        "return self.geometric_p * (",
        "tests/test_objective.py -k test_weights",
    ),
    Fault(
        "train step: the loss is divided by all positions, not by the masked ones",
        "dream_jax/train_step.py",
        "normalizer = jnp.maximum(jnp.sum(masked_BT, dtype=jnp.float32), 1.0)",
        "normalizer = jnp.float32(masked_BT.size)",
        "tests/test_train_step.py -k adamw_by_hand",
    ),
    Fault(
        "schedule: counts are rounded to the nearest integer, not down",
        "dream_jax/schedule.py",
        "jnp.floor(",
        "jnp.round(",
        "tests/test_schedule.py -k counts",
    ),
    Fault(
        "decoding: the least confident positions are written first",
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
        "sampler: a token whose confidence is equal to the threshold is not written",
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
        "grid.shifted(noise)",
        "grid.shifted(0.5)",
        "tests/test_optimizer.py -k no_bias",
    ),
    Fault(
        "lora: the product of the adapter is not divided by the rank",
        "dream_jax/lora.py",
        "linear.lora_alpha / rank * jnp.matmul",
        "linear.lora_alpha * jnp.matmul",
        "tests/test_lora.py -k merged_is",
    ),
    Fault(
        "quantisation: a row has one scale, not one for each block",
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
        "tokenizer: a chat prompt ends with the start of a user turn, not of an assistant turn",
        "dream_jax/tokenizer.py",
        'ids += [self.im_start_id, *b"assistant\\n"]',
        'ids += [self.im_start_id, *b"user\\n"]',
        "tests/test_tokenizer.py -k byte_chat",
    ),
    Fault(
        "data: a row is filled with one end-of-text token too many",
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
        "trainer: a resumed run starts again at the beginning of its data",
        "dream_jax/trainer/steps.py",
        'run.batches.set_state(meta["data"])',
        "pass",
        "tests/test_trainer.py -k with_an_unfinished_run",
    ),
    Fault(
        "trainer: the cost counts the last segment of a run only",
        "dream_jax/trainer/cost.py",
        "chip_hours = sum(hours)",
        "chip_hours = hours[-1]",
        "tests/test_run_report.py -k cost_of_a_run",
    ),
    Fault(
        "evaluation: the confidence interval covers 90 %, not 95 %",
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
        "evaluation: the first sentence of an answer counts, not the last",
        "dream_jax/judges/conclusions.py",
        "for sentence in reversed(_sentences(text)):",
        "for sentence in _sentences(text):",
        "tests/test_evaluation_judges.py -k test_numbers",
    ),
    Fault(
        "plan: the FLOPs of attention are not counted",
        "dream_jax/plan/arithmetic.py",
        "(products + attention + head + shape.forward * only)",
        "(products + head + shape.forward * only)",
        "tests/test_plan.py -k flops_of_a_token",
    ),
    Fault(
        "flops: the FLOPs of an adapter are not counted",
        "dream_jax/flops.py",
        "matrices = each * layers + 6 * adapter",
        "matrices = each * layers",
        "tests/test_adapters.py -k no_gradient_of_its_own",
    ),
)


def wrong_places(root: pathlib.Path) -> list[str]:
    """Returns one message for each fault whose text does not occur exactly once in its file."""
    found = []
    for fault in FAULTS:
        path = root / fault.path
        count = path.read_text().count(fault.text) if path.is_file() else 0
        if count != 1:
            found.append(f"{fault.path} holds {fault.text!r} {count} times ({fault.name})")
    return found


def table() -> str:
    """Returns the Markdown table of the faults for docs/testing.md."""
    rows = [f"| {fault.name} | `{fault.path}` | `{fault.tests}` |" for fault in FAULTS]
    return "\n".join(["| fault | in | noticed by |", "| --- | --- | --- |", *rows]) + "\n"


def copy_tree(target: pathlib.Path) -> None:
    """Copies the tracked files, with their present contents on the disk, into the folder `target`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def try_out(fault: Fault, tree: pathlib.Path) -> tuple[int, str]:
    """Runs the tests of a fault in `tree`, a copy of the repository, and then restores the changed file.

    Returns:
      The exit status of pytest, and the last three lines of its output.
    """
    path = tree / fault.path
    content = path.read_text()
    path.write_text(content.replace(fault.text, fault.instead))
    # The tests share the compiled programs of the repository, because most programs are the same.
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
    """Prints one line per fault. Returns 0 if all faults were noticed, 1 if not, and 2 if the list has errors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="substrings of the names of faults; by default all faults")
    parser.add_argument("--jobs", type=int, default=1, help="number of faults that are tried at the same time")
    parser.add_argument("--table", action="store_true", help="only print the table for docs/testing.md")
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
                # pytest returns 1 if tests failed and 0 if none failed. Any other status, such as 5 (no test selected),
                # is an error in this list.
                verdict = {0: "NOT CAUGHT", 1: "caught"}.get(code, f"ERROR {code}")
                missed += code != 1
                print(f"{verdict:10}  {fault.name}  [{fault.tests}]  {seconds:.0f} s", flush=True)
                if code != 1:
                    print(said, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
