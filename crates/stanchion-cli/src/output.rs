//! Writes data to stdout: JSON, tables, and text that cannot steer a terminal.

use std::borrow::Cow;
use std::io::{self, Write as _};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use stanchion::store::{Demand, HolderState, KeyState, WaiterState};
use stanchion::{RunRecord, is_printable};
use unicode_width::UnicodeWidthStr as _;

use crate::exit_code;
use crate::message::Failure;

/// A key as `--json` shows it.
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
    lingers: bool,
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
            lingers: holder.lingers,
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

/// The last run of a key as `--json` shows it.
#[derive(Serialize)]
pub(crate) struct RunLine<'a> {
    succeeded: bool,
    owner: &'a str,
    fence: u64,
    slot: Option<u64>,
    began: String,
    took_ms: u64,
    age_ms: u64,
    closed_for_ms: Option<u64>,
}

impl<'a> From<&'a RunRecord> for RunLine<'a> {
    fn from(run: &'a RunRecord) -> Self {
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

/// The last run of a key among those of other keys, as `--json` shows it.
#[derive(Serialize)]
pub(crate) struct RunOfKey<'a> {
    pub(crate) key: &'a str,
    #[serde(flatten)]
    pub(crate) run: RunLine<'a>,
}

/// Returns a span in whole milliseconds.
pub(crate) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The first time that has no name in RFC 3339: the year 10000.
const BEYOND: Duration = Duration::from_secs(253_402_300_800);

/// Returns a time by RFC 3339 in UTC, to the millisecond. Years below 1970 and above 9999 are shown as the nearest time that
/// the format has.
pub(crate) fn wall_time(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let since = since.min(BEYOND - Duration::from_millis(1));
    humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since).to_string()
}

/// Returns a span as people read it, in its two largest units, `4m 20s`, `3d`, `150ms`.
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

/// Returns a measured span with three digits: `0.042 ms`, `3.14 ms`, `314 ms`, `3.14 s`.
pub(crate) fn measured(span: Duration) -> String {
    let millis = span.as_secs_f64() * 1_000.0;
    match millis {
        ..0.9995 => format!("{millis:.3} ms"),
        ..9.995 => format!("{millis:.2} ms"),
        ..99.95 => format!("{millis:.1} ms"),
        ..999.5 => format!("{millis:.0} ms"),
        _ => format!("{:.2} s", span.as_secs_f64()),
    }
}

/// Returns the sentence for a request whose limit is not the limit of the holders.
pub(crate) fn limits_differ(in_use: u32, asked: u32) -> String {
    let (in_use, asked) = (limit(in_use), limit(asked));
    format!(
        "the key is in use with {in_use}, this request says {asked}: the smaller limit holds until the holders of the \
         other are gone"
    )
}

/// Returns a limit as people read it.
pub(crate) fn limit(capacity: u32) -> String {
    match capacity {
        Demand::MAX => "no limit (--shared)".to_owned(),
        limit => format!("a limit of {limit}"),
    }
}

/// Returns one line of JSON. Characters that are not printable occur in texts only, and are escaped there.
pub(crate) fn json_line(record: &impl Serialize) -> Result<String, Failure> {
    let refused = |error| Failure::new(exit_code::INTERNAL, format!("cannot write JSON: {error}"));
    let json = serde_json::to_string(record).map_err(refused)?;
    let mut line = String::with_capacity(json.len() + 1);
    for c in json.chars() {
        if is_printable(c) {
            line.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                line.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    Ok(line + "\n")
}

/// Returns a message with characters that are not printable written as `\u{…}`.
pub(crate) fn visible(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if is_printable(c) {
            out.push(c)
        } else {
            out.extend(c.escape_default())
        }
        out
    })
}

/// Returns a user's text for a line of ours. No two texts look the same: characters that are not printable and the backslash are
/// escaped, and so is a space at the beginning, at the end and after a space, because two of them separate columns.
pub(crate) fn escape(text: &str) -> String {
    pieces(text).collect()
}

/// Maximum width of a cell in columns of a terminal. `--json` and `inspect` show all.
const CELL: usize = 80;

/// Returns a user's text for a cell of a table, cut with an ellipsis if it is too long.
pub(crate) fn cell(text: &str) -> String {
    let mut out = String::new();
    let (mut width, mut fits) = (0, 0);
    for piece in pieces(text) {
        width += piece.width();
        if width > CELL {
            out.truncate(fits);
            return out + "…";
        }
        out.push_str(&piece);
        if width < CELL {
            fits = out.len();
        }
    }
    out
}

/// Returns a user's text for a line of ours, cut in the middle if it is wider than `limit`: names that begin alike
/// mostly differ at the end.
pub(crate) fn shortened(text: &str, limit: usize) -> String {
    let pieces: Vec<_> = pieces(text).collect();
    if pieces.iter().map(|piece| piece.width()).sum::<usize>() <= limit {
        return pieces.concat();
    }
    let fitting = |pieces: &mut dyn Iterator<Item = &Cow<'_, str>>, limit: usize| {
        let mut width = 0;
        pieces
            .take_while(|piece| {
                width += piece.width();
                width <= limit
            })
            .count()
    };
    let head = fitting(&mut pieces.iter(), limit.saturating_sub(1).div_ceil(2));
    let tail = fitting(&mut pieces.iter().rev(), limit.saturating_sub(1) / 2);
    format!("{}…{}", pieces[..head].concat(), pieces[pieces.len() - tail..].concat())
}

/// Returns the width of the terminal at stdout, or `None` if stdout is no terminal.
pub(crate) fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    Some(match size.ws_col {
        0 => 80,
        columns => columns.into(),
    })
}

fn pieces(text: &str) -> impl Iterator<Item = Cow<'_, str>> {
    let mut after_space = true;
    text.char_indices().map(move |(at, c)| {
        let end = at + c.len_utf8();
        let is_space = c == ' ';
        let fakes = is_space && (after_space || end == text.len());
        after_space = is_space;
        if fakes {
            "\\u{20}".into()
        } else if is_printable(c) && c != '\\' {
            text[at..end].into()
        } else {
            c.escape_default().to_string().into()
        }
    })
}

/// Returns a table with aligned columns, two spaces between them. A cell that is wider than [`CELL`] moves the rest of
/// its row, and no other row.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.width()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width().min(CELL));
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded =
            cells.zip(&widths).map(|(cell, width)| format!("{cell}{}", " ".repeat(width.saturating_sub(cell.width()))));
        let padded: Vec<String> = padded.collect();
        out.push_str(padded.join("  ").trim_end());
        out.push('\n');
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// The fate of a piece of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Printed {
    /// The output was written.
    Yes,
    /// The reader has gone, as after `| head`, which is no error.
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
    fn escaped_text_is_harmless() {
        let table = [
            ("a\u{1b}[31m\tb\r\n", "a\\u{1b}[31m\\tb\\r\\n"),
            ("\u{202e}txt\u{9b}1m\u{7f}", "\\u{202e}txt\\u{9b}1m\\u{7f}"),
            ("größe 漢字 {} ‘x’", "größe 漢字 {} ‘x’"),
            (
                "a\u{ad}b\u{e0041}\u{fff9}\u{3164}\u{115f}\u{180e}",
                "a\\u{ad}b\\u{e0041}\\u{fff9}\\u{3164}\\u{115f}\\u{180e}",
            ),
            (r"a\nb", r"a\\nb"),
            (r"\u{1b}", r"\\u{1b}"),
            ("a b  held   9", "a b \\u{20}held \\u{20}\\u{20}9"),
            (" a ", "\\u{20}a\\u{20}"),
            (" ", "\\u{20}"),
            ("a\u{3000}b\u{a0}c", "a\\u{3000}b\\u{a0}c"),
        ];
        for (text, shown) in table {
            assert_eq!(escape(text), shown);
            assert_eq!(visible(shown), shown, "shown once more it stays");
        }
    }

    #[test]
    fn json_escapes_invisible_text() {
        let text = "\u{7f}\u{9b}\u{202e}\u{200b}\u{e0041}\u{1b}é漢\\\"  x";
        let line = json_line(&text).unwrap();
        let expected = r#""\u007f\u009b\u202e\u200b\udb40\udc41\u001bé漢\\\"  x""#;
        assert_eq!(line.trim_end(), expected);
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), text);
    }

    #[test]
    fn cells_end_between_characters() {
        assert_eq!(cell(&"é".repeat(80)), "é".repeat(80));
        assert_eq!(cell(&"é".repeat(81)), "é".repeat(79) + "…");
        assert_eq!(cell(&("x".repeat(76) + "\u{1b}yyy")), "x".repeat(76) + "…", "no half of an escape");
        assert_eq!(cell(&"鍵".repeat(40)), "鍵".repeat(40));
        assert_eq!(cell(&"鍵".repeat(41)), "鍵".repeat(39) + "…");
    }

    #[test]
    fn shortened_text_keeps_both_ends() {
        assert_eq!(shortened("abcdefghij", 10), "abcdefghij");
        assert_eq!(shortened("abcdefghijk", 10), "abcde…hijk");
        assert_eq!(shortened("鍵鍵鍵鍵鍵鍵", 10), "鍵鍵…鍵鍵");
        assert_eq!(shortened("aaaa\u{1b}bbbb\u{1b}cccc", 12), "aaaa…cccc", "no half of an escape");
    }

    #[test]
    fn every_time_has_a_text() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let table = [
            (at(0), "1970-01-01T00:00:00.000Z"),
            (at(253_402_300_799), "9999-12-31T23:59:59.000Z"),
            (at(253_402_300_800), "9999-12-31T23:59:59.999Z"),
            (at(u64::MAX / 1_000_000), "9999-12-31T23:59:59.999Z"),
            (SystemTime::UNIX_EPOCH - Duration::from_secs(1), "1970-01-01T00:00:00.000Z"),
        ];
        for (time, text) in table {
            assert_eq!(wall_time(time), text);
        }
        for span in [Duration::MAX, Duration::from_micros(u64::MAX)] {
            assert!(!for_people(span).is_empty());
        }
    }

    #[test]
    fn spans_have_two_units() {
        let table = [(0, "0s"), (7, "7ms"), (1_234, "1s 200ms"), (61_500, "1m 1s"), (90_000_000, "1day 1h")];
        for (millis, text) in table {
            assert_eq!(for_people(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn measured_spans_have_three_digits() {
        let table = [(42, "0.042 ms"), (999, "0.999 ms"), (3_141, "3.14 ms"), (31_416, "31.4 ms")];
        let longer = [(314_159, "314 ms"), (999_600, "1.00 s"), (3_141_593, "3.14 s"), (62_000_000, "62.00 s")];
        for (micros, text) in table.into_iter().chain(longer) {
            assert_eq!(measured(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn table_columns_are_aligned() {
        let rows = [vec!["a".to_owned(), "bbb".into()], vec!["größe".into(), String::new()]];
        assert_eq!(table(&["KEY", "X"], &rows), "KEY    X\na      bbb\ngröße\n");
        // A character of Chinese, Japanese or Korean takes two columns, an accent of its own none.
        let rows = ["鍵", "한글", "e\u{301}", "abcd"].map(|key| vec![key.to_owned(), "x".into()]);
        assert_eq!(table(&["KEY", "X"], &rows), "KEY   X\n鍵    x\n한글  x\ne\u{301}     x\nabcd  x\n");
        let rows = ["y".repeat(70_000), "z".into()].map(|key| vec![key, "x".into()]);
        let text = table(&["KEY", "X"], &rows);
        assert!(text.lines().nth(2).is_some_and(|line| line.len() == CELL + 3), "one wide cell widens no other row");
    }
}
