"""A run of distillation that many faults strike, beside one that nothing disturbs.

    python -m tests.helpers.chaos --steps 200 --faults 14 --seed 0 --directory /tmp/chaos

Two ranks distil a cascade of two teachers, the first behind a scripted server. The steps are cut
into as many stretches as there are faults, and in each strikes one, drawn by the seed; what has
ended is launched again. Held against the calm run: the weights, to the bit up to where the number
of ranks changes; and the updates that each fault costs, `save_every` at most.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from safetensors.torch import load_file

from marco_train.checkpoint.lock import LOCK
from tests.helpers.checkpoints import same_state
from tests.helpers.fake_server import FakeServer
from tests.helpers.faults import Fault, launch
from tests.helpers.runs import num_steps_of, saved_steps
from tests.helpers.world import World, make_world

NUM_RANKS = 2
TOLERANCE = 1e-6
"""Of a weight, once ranks have added up in another order; float32, with a learning rate of 1e-4."""
SAVE_AFTER_SECONDS = 2
AWAY_SECONDS = 2
GIVE_UP_SECONDS = 6
HANG_SECONDS = 15
LONGEST_LAUNCH_SECONDS = 400
STEP_LINE = re.compile(r"step (\d+)/\d+ ")


@dataclass(frozen=True)
class Kind:
    """What may strike."""

    name: str
    inside: tuple[str, str] | None = None
    """Point and action of what strikes from inside a rank; None: from outside, after a step."""
    ends_launch: bool = True
    saves: bool = False
    """Whether it strikes while a checkpoint is saved."""
    asks_server: bool = False
    """Whether it needs the phase whose teacher is a server."""


SWITCH = Kind("kill -9 at the phase's switch", ("export", "kill"))
RESIZE = Kind("another number of ranks", ("train_step", "end"))
FLIP = Kind("flipped bit in the newest checkpoint", ("train_step", "end"))
NAN = Kind("loss that is no number", ("train_step", "nan"), ends_launch=False)
KILL_ALL = Kind("kill -9 of all")
AWAY = Kind("teacher away", ends_launch=False, asks_server=True)
GONE = Kind("teacher dead", asks_server=True)
KINDS = [
    Kind("kill -9 of a rank", ("train_step", "kill")),
    KILL_ALL,
    Kind("kill -9 during a save", ("publish", "kill"), saves=True),
    Kind("SIGTERM", ("train_step", "end")),
    Kind("full disk", ("save", "full_disk"), ends_launch=False, saves=True),
    FLIP,
    Kind("hung rank", ("train_step", "hang")),
    NAN,
    Kind("error of a rank", ("train_step", "raise")),
    AWAY,
    GONE,
]


@dataclass
class Strike:
    """A fault of the run, and what came of it."""

    kind: Kind
    step: int
    """Updates made as it strikes."""
    fault: Fault | None
    struck: bool = False
    made: int = 0
    """Updates made when the launch that it ended had ended."""
    saved: int = 0
    """Of these, updates that the newest whole checkpoint holds."""
    lost: int = 0
    """Of these, updates made again."""


@dataclass
class Chaos:
    """What has happened to a run."""

    world: World
    num_steps: int
    save_every: int
    switch: int
    """Updates of the first phase."""
    strikes: list[Strike]
    out: Path
    server: FakeServer
    num_ranks: int = NUM_RANKS
    first_steps: list[int] = field(default_factory=list)
    """That launches began with."""
    working_seconds: float = 0.0
    """From each launch's first step, itself left out, to its last sign of life."""
    outage_seconds: float = 0.0
    wall_seconds: float = 0.0

    def overrides(self) -> list[str]:
        """Of the command line."""
        servers = "stage.cascade.first.teacher.servers"
        return [
            "experiment=quickstart_opd",
            f"root={self.world.root}",
            f"output_dir={self.out}",
            "teacher@stage.cascade.first.teacher=vllm_server",
            "stage.cascade.first.teacher.dtype=float32",
            f"{servers}.urls=[{self.server.url}]",
            f"{servers}.max_requests=4",
            f"{servers}.request_timeout_seconds=4",
            f"{servers}.save_after_seconds={SAVE_AFTER_SECONDS}",
            f"{servers}.give_up_after_seconds={GIVE_UP_SECONDS}",
            f"stage.cascade.first.num_steps={self.switch}",
            f"stage.cascade.second.num_steps={self.num_steps - self.switch}",
            "stage.objective=sampled",
            "stage.global_batch_size=8",
            "stage.max_response_length=12",
            "data.max_tokens_per_microbatch=128",
            "optim.learning_rate=1e-4",
            f"checkpoint.save_every={self.save_every}",
            f"checkpoint.keep_every={self.save_every}",
            "checkpoint.keep_last=2",
            f"parallel.expert_parallel_size={self.num_ranks}",
            f"parallel.hang_seconds={HANG_SECONDS}",
            "logging.console_every=1",
        ]

    def run(self, calm: Path | None = None) -> None:
        """Launch until the run is finished.

        Args:
            calm: The run that nothing disturbs, whose state this one has to have where its number
                of ranks changes.

        Raises:
            AssertionError: A launch ends that nothing has struck, or a fault fails to strike.
        """
        ended_by: Strike | None = None
        while self.launch(ended_by):
            struck = [s for s in self.strikes if s.struck and s.kind.ends_launch]
            assert struck and struck[-1] is not ended_by, "a launch ended that nothing has struck"
            ended_by = struck[-1]
            ended_by.made = num_steps_of(self.out)
            if not self.server.is_up:
                self.server.start()
            saved = sorted(saved_steps(self.out))
            if ended_by.kind is FLIP:
                flip_a_bit(self.out, saved.pop())
            ended_by.saved = saved[-1]
            if ended_by.kind is RESIZE:
                assert calm is not None
                newest = f"checkpoints/step_{ended_by.made:06d}"
                same_state(self.out / newest, calm / newest)
                self.num_ranks = 1
        missed = [strike.kind.name for strike in self.strikes if not strike.struck]
        assert not missed, f"these have not struck: {missed}"

    def launch(self, ended_by: Strike | None) -> bool:
        """Launch once.

        Args:
            ended_by: What ended the launch before.

        Returns:
            Whether another launch is needed.
        """
        faults = [strike.fault for strike in self.strikes if strike.fault is not None]
        began = time.monotonic()
        process = launch(
            self.overrides(),
            faults,
            self.out / "struck",
            self.num_ranks,
            MARCO_TRAIN_CACHE=str(self.out / "cache"),
        )
        guard = threading.Timer(LONGEST_LAUNCH_SECONDS, kill_all, (process, self.out))
        guard.start()
        first_at = last_at = 0.0
        resumed, output = 0, []
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            now = time.monotonic()
            if found := re.search(r"resumed from \S*step_(\d+)", line):
                resumed = int(found[1])
            elif found := STEP_LINE.match(line):
                first_at, last_at = first_at or now, now
                self.strike_from_outside(int(found[1]), process)
            elif line.startswith("fault on rank "):
                last_at = now
                self.note(line)
        code = process.wait()
        guard.cancel()
        self.wall_seconds += time.monotonic() - began
        log = self.out / f"launch_{len(self.first_steps):02d}.log"
        log.write_text("".join(output))
        assert first_at > 0, f"a launch made no step: see {log}"
        self.first_steps.append(resumed + 1)
        self.working_seconds += max(last_at - first_at, 0.0)
        if ended_by is not None:
            ended_by.lost = ended_by.made - resumed
        return code != 0

    def note(self, line: str) -> None:
        """Note a fault that said that it strikes."""
        for strike in self.strikes:
            if strike.fault is not None and str(strike.fault) in line:
                strike.struck = True

    def strike_from_outside(self, step: int, process: subprocess.Popen[str]) -> None:
        """Do what is due after so many updates."""
        for strike in self.strikes:
            if strike.struck or strike.fault is not None or strike.step != step:
                continue
            strike.struck = True
            if strike.kind is KILL_ALL:
                kill_all(process, self.out)
                continue
            self.server.stop()
            if strike.kind is AWAY:
                self.outage_seconds += AWAY_SECONDS
                threading.Timer(AWAY_SECONDS, self.server.start).start()

    def table(self) -> str:
        """What struck, and what it cost."""
        rows = [
            f"{strike.step:>5} | {strike.kind.name:<36} | "
            + (f"ended after {strike.made:>3}" if strike.kind.ends_launch else "went on        ")
            + f" | {strike.lost}"
            for strike in self.strikes
        ]
        return "\n".join([f" step | {'fault':<36} | launch          | updates lost", *rows])

    @property
    def goodput(self) -> float:
        """Useful step time over wall, without process starts, hang limits and outage waits.

        A process starts until its first step has opened its teacher; that step counts as any.
        """
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        outages = [strike.step + 1 for strike in self.strikes if strike.kind is AWAY]
        apart = {*self.first_steps, *outages}
        usual = mean(float(line["time/step"]) for line in lines if line["step"] not in apart)
        spent = self.working_seconds + len(self.first_steps) * usual - self.outage_seconds
        return self.num_steps * usual / spent


def draw(num_steps: int, num_faults: int, save_every: int, seed: int) -> list[Strike]:
    """Draw what strikes when.

    Each kind strikes before one strikes twice. The phase switches in the middle, and the last fault
    changes the number of ranks. Each strikes `save_every` updates or more after its stretch begins,
    so that it meets a run that has saved since the one before.
    """
    width, middle = num_steps // num_faults, num_faults // 2
    if width < 2 * save_every:
        raise ValueError(
            f"{num_faults} faults in {num_steps} steps leave {width} to each, and need "
            f"{2 * save_every}, twice save_every: draw fewer"
        )
    drawn = random.Random(seed)
    num_free = num_faults - 2
    kinds = drawn.sample(KINDS, min(num_free, len(KINDS)))
    # A loss that is no number once: the calm run knows it by its update.
    kinds += drawn.choices([k for k in KINDS if k is not NAN], k=num_free - len(kinds))
    kinds.sort(key=lambda kind: not kind.asks_server)  # of the first phase
    early, late = kinds[:middle], kinds[middle:]
    drawn.shuffle(early)
    return [
        strike_in(drawn, kind, range(number * width + save_every, (number + 1) * width), save_every)
        for number, kind in enumerate([*early, SWITCH, *late, RESIZE])
    ]


def strike_in(drawn: random.Random, kind: Kind, stretch: range, save_every: int) -> Strike:
    """Draw after which update of a stretch a fault strikes, and on which rank."""
    if kind.saves:
        stretch = range(-(-stretch.start // save_every) * save_every, stretch.stop, save_every)
    steps = [*stretch]
    if kind is RESIZE:  # ends with the next update, of which the calm run has a checkpoint
        steps = [step for step in stretch if (step + 1) % save_every == 0]
    step = drawn.choice(steps)
    if kind.inside is None:
        return Strike(kind, step, None)
    point, action = kind.inside
    rank: int | None = drawn.randrange(NUM_RANKS)
    if kind is NAN or point == "publish":
        rank = 0  # which there is with any number of ranks; which publishes
    if action == "full_disk":
        rank = None
    return Strike(kind, step, Fault(point, action, step, rank, again=kind is NAN))


def kill_all(process: subprocess.Popen[str], out: Path) -> None:
    """Kill a launch, its ranks included, which are in sessions of their own."""
    lock = out / LOCK
    ranks = [each["pid"] for each in json.loads(lock.read_text())["processes"]]
    for pid in (process.pid, *ranks):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def flip_a_bit(out: Path, step: int) -> None:
    """Damage a checkpoint."""
    shard = out / "checkpoints" / f"step_{step:06d}" / "rank_001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def rehearse(num_steps: int, num_faults: int, save_every: int, seed: int, directory: Path) -> Chaos:
    """Let a calm run and one that faults strike learn, and compare what they have learnt.

    Raises:
        AssertionError: They differ, a fault costs updates that were saved, or more of them than
            `save_every`.
    """
    strikes = draw(num_steps, num_faults, save_every, seed)
    (switch,) = (strike.step for strike in strikes if strike.kind is SWITCH)
    world, server = make_world(directory / "world"), FakeServer()
    outs = [directory / "calm", directory / "struck"]
    calm, struck = (
        Chaos(world, num_steps, save_every, switch, chosen, out, server)
        for out, chosen in zip(outs, ([s for s in strikes if s.kind is NAN], strikes), strict=True)
    )
    try:
        calm.run()
        struck.run(calm.out)
    finally:
        server.leave()
    print(struck.table())
    ended = [s for s in strikes if s.kind.ends_launch]
    assert [s.lost for s in ended] == [s.made - s.saved for s in ended]
    costly = [s for s in strikes if s.lost > save_every]
    assert not costly, f"cost more than {save_every} updates: {costly}"
    mine, theirs = (load_file(out / "export" / "model.safetensors") for out in outs)
    assert mine.keys() == theirs.keys()
    furthest = max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
    print(
        f"weights: the calm run's to the bit up to step {strikes[-1].made} on {NUM_RANKS} ranks, "
        f"and on another number of ranks within {furthest:.1e} at step {num_steps}"
    )
    assert furthest <= TOLERANCE
    print(
        f"goodput: {struck.goodput:.1%} without process starts, hang limits and outage waits, in "
        f"{len(struck.first_steps)} launches of {struck.wall_seconds:.0f} s together"
    )
    return struck


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="updates of the run")
    parser.add_argument("--faults", type=int, default=14, help="that strike it")
    parser.add_argument("--save-every", type=int, default=5, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="draws the faults")
    parser.add_argument("--directory", type=Path, help="where all is left; none: nowhere")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as anywhere:
        directory = asked.directory or Path(anywhere)
        rehearse(asked.steps, asked.faults, asked.save_every, asked.seed, directory)


if __name__ == "__main__":
    main()
