//! Data for stdout: JSON, tables, and text that cannot fool a terminal.

use std::io::{self, Write as _};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use stanchion::Run;
use stanchion::store::{Demand, HolderState, KeyState, WaiterState};

use crate::exit_code;
use crate::message::Failure;

/// What `--json` prints; part of the tool's contract.
pub(crate) const JSON_HELP: &str = "\
JSON (--json), a stable contract: fields are added, never changed or removed. One object per line:
  key              the key
  capacity         the limit that counts: how many units fit (1: one at a time), the smallest that a
                   holder requested; or null if it is not in use
  holders          oldest first: fence, owner, units, capacity, session_bound, age_ms, since,
                   remaining_ms, metadata, trace
  waiters          head of the queue first: owner, units, capacity, age_ms, metadata, trace
  last_fence       the newest fence of the key, or null
  closed_for_ms    how long a cooldown still keeps the key closed, or null
`inspect --json` adds:
  last_run         the last run of `once`, or null: succeeded, owner, fence, slot, began, took_ms,
                   age_ms, closed_for_ms (until it may be run again, or null)
`watch --json` prints instead: time, event (held, acquired, released, waiting, stopped_waiting,
closed, opened), key, and as they apply fence, owner, closed_for_ms.
Fences are numbers below 2^53, exact in every JSON reader. Fields that end in _ms are whole
milliseconds; since, began and time are RFC 3339 in UTC. Text is what was given: escape it before you show it.

Exit codes: 0; 64 wrong usage; 69 store unavailable; 70 internal; 77 not permitted; 78 misconfigured.";

/// A key, as `--json` shows it.
#[derive(Debug, Serialize)]
pub(crate) struct KeyRecord<'a> {
    key: &'a str,
    capacity: Option<u32>,
    holders: Vec<HolderRecord<'a>>,
    waiters: Vec<WaiterRecord<'a>>,
    last_fence: Option<u64>,
    closed_for_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct HolderRecord<'a> {
    fence: u64,
    owner: &'a str,
    units: u32,
    capacity: u32,
    session_bound: bool,
    age_ms: u64,
    since: String,
    remaining_ms: Option<u64>,
    metadata: Option<&'a str>,
    trace: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct WaiterRecord<'a> {
    owner: &'a str,
    units: u32,
    capacity: u32,
    age_ms: u64,
    metadata: Option<&'a str>,
    trace: Option<&'a str>,
}

impl<'a> From<&'a KeyState> for KeyRecord<'a> {
    fn from(state: &'a KeyState) -> Self {
        Self {
            key: state.key.name(),
            capacity: state.capacity(),
            holders: state.holders.iter().map(HolderRecord::from).collect(),
            waiters: state.waiters.iter().map(WaiterRecord::from).collect(),
            last_fence: state.last_fence.map(stanchion::Fence::get),
            closed_for_ms: state.closed_for.map(millis),
        }
    }
}

impl<'a> From<&'a HolderState> for HolderRecord<'a> {
    fn from(holder: &'a HolderState) -> Self {
        Self {
            fence: holder.fence.get(),
            owner: &holder.owner,
            units: holder.units,
            capacity: holder.capacity,
            session_bound: holder.session_bound,
            age_ms: millis(holder.age),
            since: wall_time(holder.since),
            remaining_ms: holder.remaining.map(millis),
            metadata: holder.metadata.as_deref(),
            trace: holder.trace.as_deref(),
        }
    }
}

impl<'a> From<&'a WaiterState> for WaiterRecord<'a> {
    fn from(waiter: &'a WaiterState) -> Self {
        Self {
            owner: &waiter.owner,
            units: waiter.units,
            capacity: waiter.capacity,
            age_ms: millis(waiter.age),
            metadata: waiter.metadata.as_deref(),
            trace: waiter.trace.as_deref(),
        }
    }
}

/// The last run of a key.
#[derive(Serialize)]
pub(crate) struct RunRecord<'a> {
    succeeded: bool,
    owner: &'a str,
    fence: u64,
    slot: Option<u64>,
    began: String,
    took_ms: u64,
    age_ms: u64,
    closed_for_ms: Option<u64>,
}

impl<'a> From<&'a Run> for RunRecord<'a> {
    fn from(run: &'a Run) -> Self {
        Self {
            succeeded: run.succeeded,
            owner: &run.owner,
            fence: run.fence.get(),
            slot: run.slot,
            began: wall_time(run.began),
            took_ms: millis(run.took),
            age_ms: millis(run.age),
            closed_for_ms: run.closed_still_for().map(millis),
        }
    }
}

/// Whole milliseconds.
pub(crate) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// RFC 3339 in UTC, to the millisecond.
pub(crate) fn wall_time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// A span as people read it: its two largest units, `4m 20s`, `3d`, `150ms`.
pub(crate) fn for_people(span: Duration) -> String {
    let whole = if span < Duration::from_secs(1) {
        Duration::from_millis(millis(span))
    } else if span < Duration::from_secs(10) {
        Duration::from_millis(millis(span) / 100 * 100)
    } else {
        Duration::from_secs(span.as_secs())
    };
    let text = humantime::format_duration(whole).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Says that the holders of a key have another limit than a request.
pub(crate) fn limits_differ(in_use: u32, asked: u32) -> String {
    let (in_use, asked) = (limit(in_use), limit(asked));
    format!(
        "the key is in use with {in_use}, this request says {asked}: the smaller limit holds until the holders of the \
         other are gone"
    )
}

/// A limit as people read it.
pub(crate) fn limit(capacity: u32) -> String {
    match capacity {
        Demand::MAX => "no limit (--shared)".to_owned(),
        limit => format!("a limit of {limit}"),
    }
}

/// One line of JSON.
pub(crate) fn json_line(record: &impl Serialize) -> Result<String, Failure> {
    let refused = |error| Failure::new(exit_code::INTERNAL, format!("cannot write JSON: {error}"));
    serde_json::to_string(record).map(|line| line + "\n").map_err(refused)
}

/// The text without characters that would steer a terminal or turn the line round: they are shown as `\u{…}`.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let steers = c.is_control()
            || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if steers { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// A table with aligned columns, two spaces between them.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(padded.join("  ").trim_end());
        out.push('\n');
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// What became of a piece of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Printed {
    /// It was written.
    Yes,
    /// Nobody reads any more, as after `| head`: a quiet end.
    NobodyReads,
}

/// Writes data to stdout.
pub(crate) fn print(data: &str) -> Result<Printed, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(data.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Printed::Yes),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Printed::NobodyReads),
        Err(error) => Err(Failure::new(exit_code::INTERNAL, format!("cannot write to stdout: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_steer_a_terminal() {
        assert_eq!(escape("a\u{1b}[31m\tb\r\n"), "a\\u{1b}[31m\\tb\\r\\n");
        assert_eq!(escape("\u{202e}txt\u{9b}1m\u{7f}"), "\\u{202e}txt\\u{9b}1m\\u{7f}");
        assert_eq!(escape("größe 漢字 {} ‘x’"), "größe 漢字 {} ‘x’");
    }

    #[test]
    fn spans_are_short() {
        let table = [(0, "0s"), (7, "7ms"), (1_234, "1s 200ms"), (61_500, "1m 1s"), (90_000_000, "1day 1h")];
        for (millis, text) in table {
            assert_eq!(for_people(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn a_table_is_aligned() {
        let rows = [vec!["a".to_owned(), "bbb".into()], vec!["größe".into(), String::new()]];
        assert_eq!(table(&["KEY", "X"], &rows), "KEY    X\na      bbb\ngröße\n");
    }
}
