//! The parts of help and man pages that no option has: examples, exit codes, the environment, JSON.

use crate::exit_code;

/// A term and its explanation.
pub(crate) type Entry = (&'static str, &'static str);

/// The forms of a duration.
pub(crate) const DURATIONS: &str =
    "30 and 1.5 (seconds), 500ms, 30s, 5m, 2h, 1d, '1h 30m'; from 10ms to 30d. A wait may also be 0.";

pub(crate) const ENVIRONMENT: [Entry; 7] = [
    (
        "STANCHION_STORE",
        "URL of the store; without it, a folder of the user: this user on this machine only. It may hold a password, \
         which --store refuses, because every user of the machine can read the arguments of a program",
    ),
    ("STANCHION_STORE_FILE", "a file whose first line is that URL"),
    ("XDG_STATE_HOME, HOME", "where that folder is: $XDG_STATE_HOME/stanchion, or ~/.local/state/stanchion"),
    ("STANCHION_NAMESPACE", "the namespace of the keys, as --namespace"),
    ("STANCHION_TOKEN", "the token of a hold, for extend and release"),
    ("STANCHION_KEY", "given to the command: the key; of several keys, one a line"),
    (
        "STANCHION_FENCE",
        "given to the command: the fence of this hold, a number that grows with every hold of the key; send it \
         along, and let the receiver refuse lower ones. Of several keys, one a line, in the order of STANCHION_KEY",
    ),
];

/// Returns the examples of a command, or of the tool.
pub(crate) fn examples(command: &str) -> &'static [Entry] {
    match command {
        "run" => &[
            ("stanchion run nightly -- ./backup.sh", "wait for the key, then run"),
            ("stanchion run nightly -n -- ./backup.sh", "give up at once if it is taken (exit 75)"),
            ("stanchion run deploy -w 5m -- make deploy", "wait for 5 minutes at most"),
            ("stanchion run api --permits 3 -- ./call.sh", "three at a time"),
            ("stanchion run --key a --key b -- ./move.sh", "hold two keys, all or nothing"),
            ("stanchion run k -c 'date > today; sync'", "a line for the shell"),
        ],
        "once" => &[
            ("stanchion once report --every 1h -- ./report.sh", "at most once an hour, on many machines"),
            ("stanchion once mail --slot $(date +%Y%m%d) -- ./mail.sh", "once for each day"),
            ("stanchion once report --every 1h --force -- ./report.sh", "now, although it is not due"),
            ("stanchion once report --forget", "let the next machine run it"),
        ],
        "elect" => &[
            ("stanchion elect scheduler -- ./scheduler", "one leader; the next one starts when it ends"),
            ("stanchion elect api --ready-file /run/leads -- ./api", "for a readiness check"),
        ],
        "wait" => &[("stanchion wait deploy -w 5m", "until the key is free, without taking it")],
        "acquire" => &[
            ("eval \"$(stanchion acquire deploy --export)\" || exit", "held until the script ends"),
            ("stanchion acquire deploy --ttl 30m --token-file t", "CI: the token in a file"),
        ],
        "extend" => &[("stanchion extend --ttl 30m --token-file t", "30 minutes from now")],
        "release" => &[
            ("stanchion release", "the hold of STANCHION_TOKEN"),
            ("stanchion release --token-file t", "the hold of a token in a file"),
        ],
        "ls" => &[
            ("stanchion ls", "who holds what, and who waits"),
            ("stanchion ls deploy/", "only keys that begin with deploy/"),
            ("stanchion ls --runs", "the last runs of `once`"),
        ],
        "inspect" => &[
            ("stanchion inspect nightly", "holders, queue, fences, the last run"),
            ("stanchion inspect nightly --check && echo free", "decides nothing: another may be faster"),
        ],
        "watch" => {
            &[("stanchion watch", "every change of every key"), ("stanchion watch deploy/ --json", "for a program")]
        }
        "force-release" => &[
            ("stanchion force-release deploy", "show the holds, and ask"),
            ("stanchion force-release deploy --fence 1764536401123456 --reason gone", "do not ask"),
        ],
        "top" => &[("stanchion top", "all keys"), ("stanchion top deploy/", "only keys that begin with deploy/")],
        "doctor" => &[
            ("stanchion doctor", "before you trust a store"),
            ("stanchion doctor --strict --json", "for a monitoring check"),
        ],
        "bench" => &[("stanchion bench --for 10s --tasks 50", "longer, with more tasks")],
        "schema" => &[
            ("stanchion schema --store postgres://db.example/app | psql", "read it first, if you like"),
            ("stanchion schema --store-file owner.url --apply", "with the URL of the schema's owner"),
        ],
        "completions" => &[("source <(stanchion completions bash)", "in ~/.bashrc")],
        "man" => &[
            ("stanchion man | man -l -", "read the page of the tool"),
            ("stanchion man /usr/local/share/man/man1", "install all pages"),
        ],
        "stanchion" => &[
            ("stanchion run nightly -- ./backup.sh", "wait for the key, then run"),
            ("stanchion run nightly -n -- ./backup.sh", "give up at once if it is taken (exit 75)"),
            ("stanchion once report --every 1h -- ./report.sh", "at most once an hour, on many machines"),
            ("stanchion elect scheduler -- ./scheduler", "one leader; the next one starts when it ends"),
            ("stanchion ls", "who holds what, and who waits"),
            ("STANCHION_STORE=sqlite:/srv/locks stanchion ls", "another store than your own folder"),
        ],
        _ => &[],
    }
}

const LS_JSON: &str = "\
One object per key and line. The format is stable: fields are added,
never changed or removed.
  key            the key
  capacity       the limit that counts (1: one at a time), the smallest
                 that a holder requested; null if the key is not in use
  holders        oldest first: fence, owner, units, capacity,
                 session_bound, age_ms, since, remaining_ms, metadata,
                 trace, lingers (its process may not be using it)
  waiters        head of the queue first: owner, units, capacity,
                 age_ms, metadata, trace
  last_fence     the newest fence of the key, or null
  closed_for_ms  how long a cooldown still keeps the key closed, or null
With --runs, one object per key that `once` has run:
  key            the key
  succeeded, owner, fence, slot, began, took_ms, age_ms
                 the run; slot is null if it had none
  closed_for_ms  how long it may not be run again, or null
";

const INSPECT_JSON: &str = "\
One object, on one line: the fields of `stanchion ls --json`, and
  last_run       the last run of `once`, or null: the fields of
                 `stanchion ls --runs --json` without the key
";

const WATCH_JSON: &str = "\
One object per change and line. The format is stable: fields are added,
never changed or removed.
  time           when the look that found the change was taken
  event          held (at the first look), acquired, released, waiting,
                 stopped_waiting, closed, opened
  key            the key
  fence, owner, closed_for_ms
                 absent unless they apply
";

const DOCTOR_JSON: &str = "\
One object per check and line. The format is stable: fields are added,
never changed or removed.
  check          store, open, server, rights, clock, hand-off, latency,
                 settings (once per warning)
  outcome        ok, warning, failed or skipped
  message        the text of the line, for people
  took_us        of open, hand-off and latency: the time in whole
                 microseconds
  offset_us      of clock: the store's clock minus this machine's, in
                 whole microseconds
";

const BENCH_JSON: &str = "\
One object. The format is stable: fields are added, never changed or
removed.
  store          the store, without user and password
  for_ms         the length of each measurement
  measurements   tasks, step, count, per_second, p50_us, p99_us
A step is an acquire, a release, a pair of both on a key that nobody
else uses, or a hand-off: from the begin of a release to the grant of
the next waiter. p50 and p99: half, and 99 of 100, took no longer.
";

const JSON_FORMS: &str = "\
Fences are numbers below 2^53. Fields that end in _ms are whole
milliseconds; since, began and time are RFC 3339 in UTC. Characters that
are invisible or steer a terminal are written as \\uXXXX.";

/// Returns the description of a command's output with `--json`, in lines that stay as they are.
pub(crate) fn json(command: &str) -> Option<String> {
    let fields = match command {
        "ls" => LS_JSON,
        "inspect" => INSPECT_JSON,
        "watch" => WATCH_JSON,
        "doctor" => return Some(DOCTOR_JSON.to_owned()),
        "bench" => return Some(BENCH_JSON.to_owned()),
        _ => return None,
    };
    Some(format!("{fields}{JSON_FORMS}"))
}

/// Returns the text after the options in `--help` of a command, or of the tool.
pub(crate) fn after_options(command: &str) -> String {
    let mut sections = vec![("Examples", table(examples(command)))];
    if let Some(json) = json(command) {
        sections.push(("JSON (--json)", json.lines().map(|line| format!("  {line}\n")).collect()));
    }
    if command == "stanchion" {
        sections.push(("Durations (DUR)", format!("  {DURATIONS}\n")));
        sections.push(("Environment", table(&ENVIRONMENT)));
    }
    let codes = if command == "stanchion" { exit_code::table(command) } else { exit_code::of_command(command) };
    sections.push(("Exit codes", table(&codes)));
    let sections = sections.into_iter().map(|(title, text)| format!("{title}:\n{text}"));
    sections.collect::<Vec<_>>().join("\n").trim_end().to_owned()
}

/// Maximum width of a line in `--help`.
const WIDTH: usize = 100;

/// Returns entries in two columns. A term that is repeated is shown once.
fn table(entries: &[Entry]) -> String {
    let column = entries.iter().map(|(term, _)| term.len()).filter(|width| *width <= 60).max().unwrap_or(0);
    let mut out = String::new();
    let mut before = "";
    for (term, text) in entries {
        let shown = if *term == before { "" } else { term };
        let mut line = format!("  {shown:column$}");
        if shown.len() > column && !text.is_empty() {
            out += &line;
            out.push('\n');
            line = " ".repeat(column + 2);
        }
        line += " ";
        for word in text.split(' ') {
            if line.len() + 1 + word.len() > WIDTH {
                out += line.trim_end();
                out.push('\n');
                line = " ".repeat(column + 3);
            }
            line.push(' ');
            line += word;
        }
        out += line.trim_end();
        out.push('\n');
        before = term;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_entries_continue_in_their_column() {
        let long = "word ".repeat(30);
        let long: &'static str = long.trim_end().to_owned().leak();
        let text = table(&[("64", "wrong usage"), ("64", "again"), ("128+N", long)]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..2], ["  64     wrong usage", "         again"]);
        assert!(lines[2].starts_with("  128+N  word") && lines[3].starts_with("         word"), "{text}");
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{text}");
    }

    #[test]
    fn preformatted_lines_fit_a_man_page() {
        // A page of 80 columns has an indent of 7.
        let commands = "stanchion run once elect wait acquire extend release ls inspect watch top force-release doctor bench schema completions man";
        for command in commands.split(' ') {
            let examples = examples(command);
            assert!(!examples.is_empty(), "{command}");
            let json = json(command).unwrap_or_default();
            let lines = json.lines().chain(examples.iter().flat_map(|(line, effect)| [*line, *effect]));
            let wide = lines.into_iter().find(|line| line.chars().count() > 72);
            assert_eq!(wide, None, "{command}");
        }
    }
}
