#!/usr/bin/env python3
"""Breaks delivery and the placement leader, one line at a time, and says which breaks the simulation finds.

    crates/engine/tests/mutants.py [NAME ...]

Needs the toolchain alone. Works in a copy under target/mutants and takes about half a minute for each mutant.
"""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
COPY = ROOT / "target" / "mutants"
DELIVERY = "crates/engine/src/delivery"

# Name, file, what is there, what is put in its place.
MUTANTS = [
    ("a worker is asked twice for a pair", f"{DELIVERY}/flight.rs",
     "std::iter::successors(Some(part), |&at| self.parts[at].of).map(", "std::iter::once(part).map("),
    ("what a liar brought stays in use", f"{DELIVERY}/flight.rs",
     "if matches!(self.pairs[pair].state, PairState::Answered { part, .. } if part == number) {", "if false {"),
    ("one worker's claim is believed at once", f"{DELIVERY}/flight.rs",
     "None => self.claims.push(claim),", "None => self.lose(self.row_of(claim.pair), claim.error),"),
    ("a claim that was contradicted costs nothing", f"{DELIVERY}/mod.rs",
     'self.dispatcher.lied(flight, part, "another worker contradicts its error");', "let _ = part;"),
    ("marked rows are added up", f"{DELIVERY}/flight.rs",
     "if marked.binary_search(&row).is_ok() {", "if false {"),
    ("weights are left out", f"{DELIVERY}/flight.rs",
     "terms.push(Term { source: source_of[part], row, weight });",
     "terms.push(Term { source: source_of[part], row, weight: weight.min(1.0) });"),
    ("a partial sum counts for every worker that has the row", f"{DELIVERY}/flight.rs",
     "if pairs.first().is_some_and(|&pair| self.pairs[pair].state == taken)",
     "if pairs.first().is_some_and(|&pair| self.pairs[pair].state != PairState::Lost || taken == PairState::Lost)"),
    ("a stand-in takes a part of a row's partial sum", f"{DELIVERY}/flight.rs",
     "let whole = |place: &u32| !kept.contains(&plan.indices[*place as usize]);",
     "let whole = |place: &u32| { let _ = (&kept, place); true };"),
    ("a failed part that was alone is waited for", f"{DELIVERY}/flight.rs",
     "(self.is_eager, self.parts[number].alone) = (true, false);", "self.is_eager = true;"),
    ("nobody looks again when workers come", f"{DELIVERY}/flight.rs",
     "self.parts.iter_mut().for_each(|part| part.alone = false);", ""),
    ("parts of a lost hop are not told", f"{DELIVERY}/dispatcher.rs",
     "fallen.push((ticket, out.part, failure.clone()));", "let _ = (&fallen, ticket, failure.clone());"),
    ("late shards do not count", f"{DELIVERY}/conduct.rs",
     "self.change(hop, |account| account.late += 1)", "self.change(hop, |_| ())"),
    ("late shards count for ever", f"{DELIVERY}/conduct.rs",
     "account.late = account.late.saturating_sub(1);", ""),
    ("nobody is in doubt", f"{DELIVERY}/conduct.rs",
     "self.change(hop, |account| account.in_doubt = true)", "self.change(hop, |_| ())"),
    ("doubt stays", f"{DELIVERY}/conduct.rs", "account.in_doubt &= account.late > 0;", ""),
    ("a lost hop keeps its rank", f"{DELIVERY}/conduct.rs",
     "*account = Account { is_lost: true, ..Account::default() };", "account.late = 0;"),
    ("faults are never too many", f"{DELIVERY}/conduct.rs",
     "if account.faults >= MOST_FAULTS {", "if account.faults > 1_000_000 {"),
    ("outputs do not clear faults", f"{DELIVERY}/conduct.rs",
     "Ok(_) => account.faults = 0,", "Ok(_) => {}"),
    ("the length of outputs is not checked", f"{DELIVERY}/mod.rs",
     "match arrived.outputs.check(flight.answers(part)) {",
     "match arrived.outputs.check(flight.answers(part)).or(Ok::<(), String>(())) {"),
    ("outputs that are not finite are taken", f"{DELIVERY}/mod.rs",
     "flight.disown(part, reason);", "return Ok(Progress::Done(flight.losses()));"),
    ("deadlines do not count", f"{DELIVERY}/mod.rs", "if now >= deadline {", "if now >= deadline + Duration::from_secs(600) {"),
    ("late shards are forgotten with their micro-batch", f"{DELIVERY}/dispatcher.rs",
     "Some(out) if out.is_late => out.ticket = None,", "Some(out) if out.is_late && out.ticket.is_none() => {}"),
    ("workers of every class own an expert", "crates/placement/src/placement.rs",
     "if !binding.admits(key, class) {", "if !binding.admits(key, class) && owners.is_empty() {"),
    ("cached blocks of another binding are adopted", "crates/engine/src/prefix.rs",
     "(!is_default).then(|| Self(Sha256::digest(binding.to_string()).into()))",
     "(!is_default).then(|| Self(Sha256::digest([]).into()))"),
    ("a shard is on time for ever", f"{DELIVERY}/flight.rs",
     "let is_due = |part: &usize| !self.is_waiting(*part) || now >= self.parts[*part].due;",
     "let is_due = |part: &usize| { let _ = now; !self.is_waiting(*part) };"),
]


def run(command, **rest):
    return subprocess.run(command, cwd=COPY, capture_output=True, text=True, **rest)


def verdict():
    """What the simulation says of the copy as it stands."""
    test = ["cargo", "test", "--release", "--locked", "-p", "muster-engine", "--test", "simulation"]
    built = run([*test, "--no-run"])
    if built.returncode:
        return "does not compile:\n" + built.stderr[-800:]
    try:
        ran = run([*test, "--", "every_invariant"], timeout=120)
    except subprocess.TimeoutExpired:
        return "found: does not end"
    if ran.returncode == 0:
        return "NOT FOUND"
    said = ran.stdout + ran.stderr
    words = [line for line in said.splitlines() if " seeds failed" in line or "only " in line or ": " in line]
    first = next((line for line in words if line.split(":")[0] in NAMES or "only " in line), "")
    count = next((line.split(" seeds")[0] for line in words if " seeds failed" in line), "")
    return f"found: {first[:90]} ({count} seeds)" if count else f"found: {first[:90]}"


NAMES = {
    "every-pair-once", "holder-only", "late-never-combined", "same-output", "no-lost-request", "bounded-patience",
    "blocks-conserved", "capacity", "one-holder-before-release", "epochs-monotone", "terms-fenced", "progress", "one-class", "conduct", "second-opinion",
}


def main():
    COPY.mkdir(parents=True, exist_ok=True)
    for name in ("Cargo.toml", "Cargo.lock", "crates", "tests", "rust-toolchain.toml", "rustfmt.toml", "clippy.toml"):
        source, to = ROOT / name, COPY / name
        if source.is_dir():
            shutil.copytree(source, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("fixtures", "__pycache__"))
        elif source.exists():
            shutil.copy2(source, to)
    missed = 0
    for name, path, before, after in MUTANTS:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        source = (ROOT / path).read_text()
        if source.count(before) != 1:
            print(f"{name}: the line is not there once; mend this list", flush=True)
            missed += 1
            continue
        (COPY / path).write_text(source.replace(before, after))
        said = verdict()
        (COPY / path).write_text(source)
        missed += not said.startswith("found")
        print(f"{name}: {said}", flush=True)
    sys.exit(missed != 0)


main()
