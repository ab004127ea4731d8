//! Decodes the record of a key without a script, for listings.
//!
//! `common.lua` defines the format. A damaged or foreign record is a [`Problem`] and not an error, because it must not
//! keep the other keys from being listed.

use super::reply::read_texts;
use crate::fence::Fence;
use crate::store::StoreTime;
use crate::token::SessionId;

/// A lowercase fragment that describes the damage.
pub(super) type Problem = String;

type Read<T> = Result<T, Problem>;

/// Maximum depth of nested values in a record. Valid records have three levels.
const MAX_DEPTH: u32 = 8;

/// The decoded record of a key.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) last: Option<Fence>,
    pub(super) closed_until: Option<StoreTime>,
    pub(super) holds: Vec<StoredHold>,
    /// Whether there are waiters, which are in Redis keys of their own.
    pub(super) queued: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredHold {
    pub(super) fence: Fence,
    pub(super) at: StoreTime,
    pub(super) deadline: Option<StoreTime>,
    pub(super) session: SessionId,
    pub(super) is_session_bound: bool,
    /// Whether the hold ends with its session: it is session-bound, or its holder has not learned of it yet.
    pub(super) ends_with_session: bool,
    pub(super) units: u32,
    pub(super) capacity: u32,
    pub(super) texts: [Option<String>; 3],
    pub(super) lingers: bool,
}

/// A waiter, without its position in the queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredWaiter {
    pub(super) at: StoreTime,
    pub(super) session: SessionId,
    pub(super) units: u32,
    pub(super) capacity: u32,
    pub(super) texts: [Option<String>; 3],
}

impl Record {
    pub(super) fn read(record: &[u8]) -> Read<Self> {
        match record.split_first() {
            Some((b'0', rest)) => {
                let (last, closed) = rest.split_at_checked(16).ok_or("the record is too short")?;
                let last = Fence::new(digits(last)?);
                let closed_until = if closed.is_empty() { None } else { Some(time(closed)?) };
                Ok(Self { last: (last.get() > 0).then_some(last), closed_until, ..Self::default() })
            }
            Some((b'1', rest)) => {
                let part = |from: usize, to: usize| rest.get(from..to).ok_or("the record is too short");
                let fence = Fence::new(digits(part(0, 16)?)?);
                let is_session_bound = is_bound(part(96, 97)?)?;
                let hold = StoredHold {
                    fence,
                    at: time(part(16, 32)?)?,
                    deadline: None,
                    session: session(part(64, 96)?)?,
                    is_session_bound,
                    ends_with_session: is_session_bound,
                    units: 1,
                    capacity: 1,
                    texts: texts(part(97, rest.len())?)?,
                    lingers: false,
                };
                Ok(Self { last: Some(fence), holds: vec![hold], ..Self::default() })
            }
            Some((b'2', packed)) => Self::unpack(packed),
            _ => Err("the record was not written by this library".into()),
        }
    }

    fn unpack(packed: &[u8]) -> Read<Self> {
        let state = Packed::read(packed)?;
        let holds = match state.field("holds") {
            Some(Packed::List(holds)) => holds.iter().map(StoredHold::unpack).collect::<Read<_>>()?,
            _ => return Err("the record lacks its holds".into()),
        };
        Ok(Self {
            last: state.text("last")?.map(digits).transpose()?.map(Fence::new),
            closed_until: state.text("closed")?.map(time).transpose()?,
            holds,
            queued: state.is("queued"),
        })
    }
}

impl StoredHold {
    fn unpack(hold: &Packed<'_>) -> Read<Self> {
        let is_session_bound = is_bound(hold.needed("kind")?)?;
        Ok(Self {
            fence: Fence::new(digits(hold.needed("fence")?)?),
            at: time(hold.needed("at")?)?,
            deadline: hold.text("deadline")?.map(time).transpose()?,
            session: session(hold.needed("session")?)?,
            is_session_bound,
            ends_with_session: is_session_bound || hold.is("unseen"),
            units: hold.number("units")?,
            capacity: hold.number("capacity")?,
            texts: texts(hold.needed("texts")?)?,
            lingers: hold.is("lingers"),
        })
    }
}

impl StoredWaiter {
    /// Decodes the entry of a waiter.
    pub(super) fn read(packed: &[u8]) -> Read<Self> {
        let waiter = Packed::read(packed)?;
        Ok(Self {
            at: time(waiter.needed("at")?)?,
            session: session(waiter.needed("session")?)?,
            units: waiter.number("units")?,
            capacity: waiter.number("capacity")?,
            texts: texts(waiter.needed("texts")?)?,
        })
    }
}

fn digits(text: &[u8]) -> Read<u64> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    text.and_then(|text| text.parse().ok()).ok_or_else(|| "a number in the record is malformed".into())
}

fn time(text: &[u8]) -> Read<StoreTime> {
    digits(text).map(StoreTime::from_micros)
}

fn session(text: &[u8]) -> Read<SessionId> {
    let session = std::str::from_utf8(text).ok().and_then(SessionId::from_hex);
    session.ok_or_else(|| "a session in the record is malformed".into())
}

fn is_bound(kind: &[u8]) -> Read<bool> {
    match kind {
        b"S" => Ok(true),
        b"F" => Ok(false),
        _ => Err("the record has a hold of an unknown kind".into()),
    }
}

fn texts(text: &[u8]) -> Read<[Option<String>; 3]> {
    let text = std::str::from_utf8(text).map_err(|_| "a text of the record is not UTF-8")?;
    read_texts(text).map_err(|_| "the texts of the record cannot be read".into())
}

/// A value that cmsgpack packed, as far as records contain it.
#[derive(Debug)]
enum Packed<'a> {
    Text(&'a [u8]),
    Number(i64),
    Flag(bool),
    List(Vec<Packed<'a>>),
    Map(Vec<(Packed<'a>, Packed<'a>)>),
    /// A value that no field of a record may have.
    Other,
}

impl<'a> Packed<'a> {
    fn read(packed: &'a [u8]) -> Read<Self> {
        let mut rest = packed;
        let value = take(&mut rest, MAX_DEPTH)?;
        if rest.is_empty() { Ok(value) } else { Err("the record continues after its end".into()) }
    }

    fn field(&self, name: &str) -> Option<&Self> {
        let Self::Map(fields) = self else { return None };
        let named = |key: &Self| matches!(key, Self::Text(text) if *text == name.as_bytes());
        fields.iter().find(|(key, _)| named(key)).map(|(_, value)| value)
    }

    fn text(&self, name: &str) -> Read<Option<&'a [u8]>> {
        match self.field(name) {
            None => Ok(None),
            Some(Self::Text(text)) => Ok(Some(text)),
            Some(_) => Err(format!("`{name}` of the record is not a text")),
        }
    }

    fn needed(&self, name: &str) -> Read<&'a [u8]> {
        self.text(name)?.ok_or_else(|| format!("the record lacks `{name}`"))
    }

    fn number(&self, name: &str) -> Read<u32> {
        match self.field(name) {
            Some(Self::Number(number)) => u32::try_from(*number).ok(),
            _ => None,
        }
        .ok_or_else(|| format!("`{name}` of the record is out of range"))
    }

    fn is(&self, name: &str) -> bool {
        matches!(self.field(name), Some(Self::Flag(true)))
    }
}

fn bytes<'a>(rest: &mut &'a [u8], count: usize) -> Read<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count).ok_or("the record ends too early")?;
    *rest = left;
    Ok(taken)
}

fn unsigned(rest: &mut &[u8], size: usize) -> Read<u64> {
    Ok(bytes(rest, size)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn length(rest: &mut &[u8], size: usize) -> Read<usize> {
    usize::try_from(unsigned(rest, size)?).map_err(|_| "the record ends too early".into())
}

fn take<'a>(rest: &mut &'a [u8], depth: u32) -> Read<Packed<'a>> {
    let Some(depth) = depth.checked_sub(1) else { return Err("the record is nested too deeply".into()) };
    let mark = bytes(rest, 1)?[0];
    let number = |number: u64| i64::try_from(number).map_or(Packed::Other, Packed::Number);
    Ok(match mark {
        0x00..=0x7f => Packed::Number(i64::from(mark)),
        0x80..=0x8f => map(rest, usize::from(mark & 0x0f), depth)?,
        0x90..=0x9f => list(rest, usize::from(mark & 0x0f), depth)?,
        0xa0..=0xbf => Packed::Text(bytes(rest, usize::from(mark & 0x1f))?),
        0xc2 | 0xc3 => Packed::Flag(mark == 0xc3),
        // Lua has no other numbers than these; whole ones are packed as integers.
        0xca => skip(rest, 4)?,
        0xcb => skip(rest, 8)?,
        0xcc..=0xcf => number(unsigned(rest, 1 << (mark - 0xcc))?),
        0xd0..=0xd3 => skip(rest, 1 << (mark - 0xd0))?,
        0xc4 | 0xd9 => packed_text(rest, 1)?,
        0xc5 | 0xda => packed_text(rest, 2)?,
        0xc6 | 0xdb => packed_text(rest, 4)?,
        0xdc | 0xdd => {
            let count = length(rest, if mark == 0xdc { 2 } else { 4 })?;
            list(rest, count, depth)?
        }
        0xde | 0xdf => {
            let count = length(rest, if mark == 0xde { 2 } else { 4 })?;
            map(rest, count, depth)?
        }
        0xe0..=0xff | 0xc0 => Packed::Other,
        _ => return Err("the record was not packed by cmsgpack".into()),
    })
}

fn skip<'a>(rest: &mut &'a [u8], count: usize) -> Read<Packed<'a>> {
    bytes(rest, count).map(|_| Packed::Other)
}

fn packed_text<'a>(rest: &mut &'a [u8], size: usize) -> Read<Packed<'a>> {
    let length = length(rest, size)?;
    bytes(rest, length).map(Packed::Text)
}

// The lists below reserve no memory for a length, which may be forged.

fn list<'a>(rest: &mut &'a [u8], count: usize, depth: u32) -> Read<Packed<'a>> {
    (0..count).map(|_| take(rest, depth)).collect::<Read<_>>().map(Packed::List)
}

fn map<'a>(rest: &mut &'a [u8], count: usize, depth: u32) -> Read<Packed<'a>> {
    (0..count).map(|_| Ok((take(rest, depth)?, take(rest, depth)?))).collect::<Read<_>>().map(Packed::Map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_record_is_read() {
        let session = "a".repeat(32);
        let plain = format!("1{:016}{:016}{}{session}S2:me--", 7, 9, "b".repeat(32));
        let record = Record::read(plain.as_bytes()).unwrap();
        assert_eq!((record.last, record.holds[0].at.as_micros()), (Some(Fence::new(7)), 9));
        assert_eq!(record.holds[0].texts[0].as_deref(), Some("me"));
        let closed = Record::read(format!("0{:016}{:016}", 7, 9).as_bytes()).unwrap();
        assert_eq!(closed.closed_until, Some(StoreTime::from_micros(9)));
    }

    #[test]
    fn broken_records_are_reported_without_panic() {
        let session = "a".repeat(32);
        let plain = format!("1{:016}{:016}{}{session}S2:me--", 7, 9, "b".repeat(32));
        for end in 0..plain.len() {
            assert!(Record::read(&plain.as_bytes()[..end]).is_err(), "{end}");
        }
        let deep = [&b"2"[..], &[0x91; 100_000]].concat();
        let claimed: [&[u8]; 4] =
            [b"2\xdd\xff\xff\xff\xff", b"2\xdf\xff\xff\xff\xff", b"2\xdb\xff\xff\xff\xff", b"2\xc1"];
        for hostile in [&deep[..], b"", b"hello", b"2", b"2\x80", b"0x", b"0000000000000000\xff"].iter().chain(&claimed)
        {
            assert!(Record::read(hostile).is_err());
        }
    }
}
