"""The demo dataset: a spoken command for a smart home -> one exact JSON record.

    python -m lora_trainer.data.demo public/datasets/demo

writes `train.jsonl` and `eval.jsonl`, the same bytes on every machine. The task is small
enough for a 135M model and objective: an answer is right only if it equals the record exactly. Two
things are held out. The *wordings*: training rows are composed from the grammar below (opener x
clause x object x time x closer), held-out rows are sentences written one by one, each used once.
And the *pairs*: the room and device of a held-out row each occur often in training, but never
together.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 7
TRAIN_ROWS = 480
SYSTEM = "Home control."  # short, but present: without it the template adds its own longer one

ROOMS = (
    "kitchen", "bedroom", "bathroom", "office", "garage",
    "hallway", "nursery", "basement", "attic", "library",
)  # fmt: skip
DEVICES = (
    "lamp", "heater", "fan", "radio", "speaker",
    "television", "projector", "humidifier", "purifier", "spotlight",
)  # fmt: skip
LEVELS = {
    "ten": "10", "twenty": "20", "thirty": "30", "forty": "40", "fifty": "50",
    "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90",
}  # fmt: skip
HOURS = (
    "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
TIMES = {
    f"{hour} {half}": f"{number}{half}"
    for half in ("am", "pm")
    for number, hour in enumerate(HOURS, start=1)
}

# ---- the grammar of the training rows: {x} is the object, the rest are slots -------------

OPENERS = (
    "", "", "", "", "please", "hey,", "okay,", "could you", "can you", "would you please",
    "I need you to", "I want you to", "go ahead and", "be so kind and", "you can", "now",
    "time to", "let us", "don't forget to", "make sure to", "I would like to", "house,",
)  # fmt: skip
CLOSERS = ("", "", "", "", "", "please", "thanks", "for me", "if you can", "okay?")
OBJECTS = (
    "the {device} in the {room}", "the {room} {device}", "the {device} in the {room}",
    "the {room} {device}", "my {room} {device}", "the {device} of the {room}",
    "our {room} {device}", "that {device} in the {room}",
    "the {device} inside the {room}", "the {room}'s {device}",
)  # fmt: skip
WHENS = (
    "at {time}", "at {time}", "at {time} sharp", "when it is {time}", "by {time}",
    "at around {time}", "once it is {time}", "at {time} today", "come {time}", "at exactly {time}",
)  # fmt: skip
COMMANDS = {
    "off": (
        "turn off {x}", "turn {x} off", "switch off {x}", "switch {x} off", "shut off {x}",
        "shut {x} off", "power off {x}", "power down {x}", "stop {x}", "kill {x}", "disable {x}",
        "cut the power to {x}", "put {x} to sleep", "take {x} offline", "stop running {x}",
        "get {x} to stop", "end {x}", "have {x} off", "pull the plug on {x}", "silence {x}",
    ),
    "on": (
        "turn on {x}", "turn {x} on", "switch on {x}", "switch {x} on", "power on {x}",
        "power up {x}", "start {x}", "start up {x}", "fire up {x}", "enable {x}", "activate {x}",
        "give {x} power", "get {x} going", "bring {x} to life", "begin running {x}",
        "get {x} to run", "launch {x}", "have {x} on", "plug in {x}", "put {x} on",
    ),
    "level": (
        "set {x} to {level} percent", "put {x} at {level} percent", "bring {x} to {level} percent",
        "adjust {x} to {level} percent", "change {x} to {level} percent", "run {x} at {level}",
        "turn {x} to {level} percent", "turn {x} down to {level}", "turn {x} up to {level} percent",
        "lower {x} to {level} percent", "raise {x} to {level}", "move {x} to {level} percent",
        "give {x} a level of {level}", "keep {x} at {level} percent", "make {x} {level} percent",
        "get {x} to {level} percent", "use {level} percent on {x}", "have {x} at {level}",
        "pick {level} percent for {x}", "limit {x} to {level} percent",
    ),
}  # fmt: skip
STATEMENTS = {
    "off": (
        "I want {x} off", "{x} should be off", "{x} has to be off", "no more {x}", "{x} off",
        "we are done with {x}", "I don't need {x} any more", "{x} can stop", "off with {x}",
        "nobody needs {x}", "{x} must not run", "why is {x} not off?", "{x} is not needed",
        "enough of {x}", "I have had it with {x}", "{x} is still running, stop it",
        "we don't want {x} on", "we can do without {x}", "I won't use {x}",
    ),
    "on": (
        "I want {x} on", "{x} should be on", "{x} has to be on", "I need {x}", "{x} on",
        "we are going to use {x}", "I want to use {x}", "{x} can start", "on with {x}",
        "somebody needs {x}", "{x} must run", "why is {x} not on?", "{x} is needed",
        "I could use {x}", "I miss {x}", "{x} is not running, start it",
        "we don't want {x} off", "we can't do without {x}", "I want {x} working",
    ),
    "level": (
        "I want {x} at {level} percent", "{x} should be at {level}",
        "{x} has to be {level} percent", "{level} percent on {x}", "{x} to {level} percent",
        "{level} is right for {x}",
        "{x} at {level} percent", "I like {x} at {level}", "{x} needs {level} percent",
        "nobody needs {x} above {level} percent", "{x} must run at {level}", "{level} for {x}",
        "why is {x} not at {level}?", "I need {x} on {level}", "{x} is too high, {level} percent",
        "{x} is too low, make it {level}",
        "we don't want {x} over {level}", "we can do with {level} percent on {x}",
        "I want {level} percent from {x}",
    ),
}  # fmt: skip

# ---- the wordings of the held-out rows, each used once ------------------------------------

HELD_OUT = {
    "off": (
        "We're leaving the {room}, so the {device} there can go off.",
        "Deactivate the {device} over in the {room}.",
        "Somebody left the {device} running in the {room}; please shut it down.",
        "Would you mind turning the {room} {device} off?",
        "The {device} in the {room} isn't being used, switch it off.",
        "I'd prefer it if the {room} {device} were off by {time}.",
        "After {time} the {room} {device} is supposed to stay off.",
        "Set the {device} in the {room} to off.",
        "See to it that the {device} goes off in the {room} at {time}.",
        "Is the {room} {device} still going? Turn that thing off.",
        "It's bedtime, turn off whatever {device} is on in the {room}.",
        "Around {time}, somebody should shut down the {device} up in the {room}.",
        "Leave the {device} off in the {room}.",
        "Do me a favour and switch the {device} off, the one in the {room}.",
        "In the {room}, the {device} may be turned off at {time}.",
        "What about turning off that noisy {room} {device}?",
        "Mind shutting off the {device} I left in the {room}?",
        "Starting {time}, we won't be needing the {room} {device}.",
        "Nobody is in the {room} at {time}, so turn its {device} off then.",
        "Save some energy: {room} {device} off at {time}.",
        "Remember that the {device} in our {room} gets switched off at {time}.",
        "Let the {room} {device} shut itself off at {time}.",
    ),
    "on": (
        "I'm heading to the {room}, have the {device} running there.",
        "Would you mind turning the {room} {device} on?",
        "Let me have the {device} on in the {room}.",
        "The {device} over in the {room} ought to be switched on.",
        "I'd be glad if the {room} {device} came on at {time}.",
        "Starting {time}, let the {device} run in the {room}.",
        "Set the {room} {device} to on.",
        "See to it that the {device} comes on in the {room} at {time}.",
        "Why not turn on the {device} we keep in the {room}?",
        "Guests arrive at {time}, turn the {device} in the {room} on then.",
        "It would be great to have the {device} working in the {room}.",
        "Do me a favour and switch the {device} on, the one in the {room}.",
        "In the {room}, the {device} may be turned on at {time}.",
        "Wake up the {device} in the {room} at {time}.",
        "Mind starting the {device} I put in the {room}?",
        "How about switching on that {room} {device}?",
        "Around {time}, somebody should start the {device} up in the {room}.",
        "I'm working in the {room} from {time}, so I'll want the {device} on.",
        "Remember that the {device} in our {room} gets switched on at {time}.",
        "{room} please: {device} on at {time}.",
        "Is the {room} {device} off? Then turn it on.",
    ),
    "level": (
        "Would you mind setting the {room} {device} to {level} percent?",
        "I'd prefer the {device} in the {room} to be around {level} percent.",
        "Crank the {room} {device} to {level} percent.",
        "Dim the {device} over in the {room} to {level} percent at {time}.",
        "Let me have {level} percent from the {device} in the {room}.",
        "Starting {time}, let the {room} {device} run on {level} percent.",
        "See to it that the {device} is at {level} percent in the {room} at {time}.",
        "My {device} in the {room} feels wrong, try {level} percent.",
        "How about {level} percent for that {device} in the {room}?",
        "Reduce the {room} {device} until it reaches {level} percent.",
        "Do me a favour and put the {device}, the one in the {room}, at {level} percent.",
        "In the {room}, the {device} may go to {level} percent at {time}.",
        "Guests arrive at {time}, so the {room} {device} goes to {level} percent then.",
        "Increase the {device} to {level} percent over in the {room}.",
        "Hold the {device} in the {room} at {level} percent from {time} onwards.",
        "For the {room}: {device}, {level} percent, {time}.",
        "Program the {room} {device} for {level} percent at {time}.",
        "The {device} belongs at {level} percent while I'm in the {room}.",
        "Remember that the {device} in our {room} goes to {level} percent at {time}.",
        "Mind bringing the {device} I left in the {room} down to {level}?",
        "Is {level} percent possible on the {room} {device} at {time}?",
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One request, the wording it was made from (slots still open), and its record."""

    wording: str
    request: str
    record: str

    def to_json(self) -> str:
        """Return the row as a line of OpenAI-style messages."""
        turns = (("system", SYSTEM), ("user", self.request), ("assistant", self.record))
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


def held_out_pairs() -> frozenset[tuple[str, str]]:
    """Return the (room, device) pairs excluded from training: two devices per room."""
    count = len(DEVICES)
    return frozenset(
        (room, DEVICES[(index + step) % count])
        for index, room in enumerate(ROOMS)
        for step in (0, count // 2)
    )


def sentence(text: str) -> str:
    """Normalize spaces of a composed request, capitalise it and add punctuation."""
    text = " ".join(text.split())
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def fill(wording: str, intent: str, room: str, device: str, rng: random.Random) -> Row:
    """Fill a wording's slots and create the record that it asks for."""
    level = rng.choice(list(LEVELS))
    time = rng.choice(list(TIMES))
    record = {
        "room": room,
        "device": device,
        "set": LEVELS[level] if intent == "level" else intent,
        "at": TIMES[time] if "{time}" in wording else "now",
    }
    request = wording.format(room=room, device=device, level=level, time=time)
    return Row(wording, sentence(request), json.dumps(record, separators=(",", ":")))


def compose(intent: str, is_timed: bool, rng: random.Random) -> str:
    """Compose one training wording from the grammar."""
    is_command = rng.random() < 0.6
    clause = rng.choice((COMMANDS if is_command else STATEMENTS)[intent])
    if is_command:
        clause = f"{rng.choice(OPENERS)} {clause}"
    if rng.random() < 0.2:  # the room first, then what to do there
        clause = "in the {room}, " + clause.replace(
            "{x}", rng.choice(("the {device}", "my {device}"))
        )
    clause = clause.replace("{x}", rng.choice(OBJECTS))
    when = rng.choice(WHENS)
    if is_timed:
        is_question = clause.endswith("?")
        clause = f"{when}, {clause}" if is_question or rng.random() < 0.35 else f"{clause} {when}"
    if is_command:
        clause = f"{clause} {rng.choice(CLOSERS)}"
    return sentence(clause)


def make_train_rows(count: int = TRAIN_ROWS, seed: int = SEED) -> list[Row]:
    """Compose the training rows: no request twice, intents and pairs in turn."""
    rng = random.Random(seed)  # noqa: S311 (data, not secrets)
    pairs = [(r, d) for r in ROOMS for d in DEVICES if (r, d) not in held_out_pairs()]
    rows: dict[str, Row] = {}
    deck: list[tuple[str, str]] = []
    while len(rows) < count:
        deck = deck or rng.sample(pairs, len(pairs))
        intent = tuple(COMMANDS)[len(rows) % len(COMMANDS)]
        wording = compose(intent, rng.random() < 0.5, rng)
        row = fill(wording, intent, *deck.pop(), rng)
        rows.setdefault(row.request.lower(), row)
    return rng.sample(list(rows.values()), count)


def make_eval_rows(seed: int = SEED) -> list[Row]:
    """Fill each held-out wording once, with pairs that training never sees."""
    rng = random.Random(seed)  # noqa: S311 (data, not secrets)
    pairs = sorted(held_out_pairs())
    deck: list[tuple[str, str]] = []
    rows = []
    for intent, wordings in HELD_OUT.items():
        for wording in wordings:
            deck = deck or rng.sample(pairs, len(pairs))
            rows.append(fill(wording, intent, *deck.pop(), rng))
    return rng.sample(rows, len(rows))


def write_demo(folder: Path) -> list[Path]:
    """Write both files into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in (("train.jsonl", make_train_rows()), ("eval.jsonl", make_eval_rows())):
        path = folder / name
        path.write_text(
            "".join(row.to_json() + "\n" for row in rows), encoding="ascii", newline="\n"
        )
        paths.append(path)
    return paths


def main(arguments: Sequence[str]) -> int:
    """Write the dataset into the folder named on the command line."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m lora_trainer.data.demo OUT_DIR\n")
        return 64
    for path in write_demo(Path(arguments[0])):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
