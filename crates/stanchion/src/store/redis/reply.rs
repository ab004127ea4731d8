//! Decodes the replies of scripts.

use std::time::Duration;

use redis::Value;

use super::error::error;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::store::{Granted, Queued, StoreTime};
use crate::token::{SessionId, TokenId};

/// The reply of a script: its status, the server's time, and further values.
#[derive(Debug)]
pub(super) struct Answer {
    /// `None` if the script took its fast path, which has only one outcome.
    status: Option<String>,
    pub(super) time: StoreTime,
    rest: Vec<Value>,
}

pub(super) fn malformed() -> Error {
    error(
        ErrorKind::Internal,
        "the server's answer cannot be read; is another version of this library's script loaded?",
    )
}

fn text(value: &Value) -> Result<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).map_err(|_| malformed()),
        Value::SimpleString(text) => Ok(text),
        _ => Err(malformed()),
    }
}

fn number<T: std::str::FromStr>(value: &Value) -> Result<T> {
    text(value)?.parse().map_err(|_| malformed())
}

fn time(value: &Value) -> Result<StoreTime> {
    number(value).map(StoreTime::from_micros)
}

impl Answer {
    pub(super) fn read(value: Value) -> Result<Self> {
        match value {
            Value::Array(mut rest) if rest.len() >= 2 => {
                let status = text(&rest[0])?.to_owned();
                let time = time(&rest[1])?;
                rest.drain(..2);
                Ok(Self { status: Some(status), time, rest })
            }
            short => Ok(Self::short(time(&short)?)),
        }
    }

    /// Returns the only reply of the fast path.
    pub(super) fn short(time: StoreTime) -> Self {
        Self { status: None, time, rest: Vec::new() }
    }

    /// Returns the status; `short` if the script took its fast path.
    pub(super) fn status(&self) -> &str {
        self.status.as_deref().unwrap_or("short")
    }

    fn at(&self, index: usize) -> Result<&Value> {
        self.rest.get(index).ok_or_else(malformed)
    }

    pub(super) fn text(&self, index: usize) -> Result<&str> {
        text(self.at(index)?)
    }

    pub(super) fn number<T: std::str::FromStr>(&self, index: usize) -> Result<T> {
        number(self.at(index)?)
    }

    /// Returns a number, or `None` if the text is empty.
    pub(super) fn option<T: std::str::FromStr>(&self, index: usize) -> Result<Option<T>> {
        if self.text(index)?.is_empty() { Ok(None) } else { self.number(index).map(Some) }
    }

    /// Returns a time span that was sent in microseconds, or `None` if the text is empty.
    pub(super) fn span(&self, index: usize) -> Result<Option<Duration>> {
        span(self.at(index)?)
    }

    pub(super) fn fence(&self, index: usize) -> Result<Fence> {
        self.number(index).map(Fence::new)
    }

    pub(super) fn granted(&self) -> Result<Granted> {
        if self.status.is_none() {
            return Ok(Granted { fence: Fence::new(self.time.as_micros()), remaining: None });
        }
        Ok(Granted { fence: self.fence(0)?, remaining: self.span(1)? })
    }

    pub(super) fn queued(&self) -> Result<Queued> {
        Ok(Queued { ahead: self.number(0)?, check_in: self.span(1)?, in_use: self.option(2)? })
    }

    pub(super) fn session(&self, index: usize) -> Result<Option<SessionId>> {
        match self.rest.get(index) {
            Some(value) => Ok(SessionId::from_hex(text(value)?)),
            None => Ok(None),
        }
    }

    pub(super) fn token(&self, index: usize) -> Result<Option<TokenId>> {
        Ok(TokenId::from_hex(self.text(index)?))
    }

    /// Returns the sessions from this index on.
    pub(super) fn sessions(&self, from: usize) -> Result<Vec<SessionId>> {
        let rest = self.rest.get(from..).unwrap_or_default();
        rest.iter().map(|value| SessionId::from_hex(text(value)?).ok_or_else(malformed)).collect()
    }

    pub(super) fn fences(&self, from: usize) -> Result<Vec<Fence>> {
        self.rest.get(from..).unwrap_or_default().iter().map(|value| number(value).map(Fence::new)).collect()
    }

    pub(super) fn spans(&self) -> Result<Vec<Duration>> {
        self.rest.iter().map(|value| Ok(span(value)?.unwrap_or_default())).collect()
    }

    pub(super) fn pairs(&self) -> impl Iterator<Item = Result<(&str, &str)>> {
        self.rest.chunks_exact(2).map(|pair| Ok((text(&pair[0])?, text(&pair[1])?)))
    }

    pub(super) fn rows(&self, index: usize) -> Result<impl Iterator<Item = Row<'_>>> {
        match self.at(index)? {
            Value::Array(rows) => Ok(rows.iter().map(|row| match row {
                Value::Array(fields) => Row(fields),
                _ => Row(&[]),
            })),
            _ => Err(malformed()),
        }
    }
}

/// A hold or a waiter in the reply of `inspect.lua`.
pub(super) struct Row<'a>(&'a [Value]);

impl<'a> Row<'a> {
    /// Returns the number of fields.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn text(&self, index: usize) -> Result<&'a str> {
        text(self.0.get(index).ok_or_else(malformed)?)
    }

    pub(super) fn number<T: std::str::FromStr>(&self, index: usize) -> Result<T> {
        number(self.0.get(index).ok_or_else(malformed)?)
    }

    pub(super) fn time(&self, index: usize) -> Result<StoreTime> {
        time(self.0.get(index).ok_or_else(malformed)?)
    }

    pub(super) fn span(&self, index: usize) -> Result<Option<Duration>> {
        span(self.0.get(index).ok_or_else(malformed)?)
    }

    pub(super) fn session(&self, index: usize) -> Result<SessionId> {
        SessionId::from_hex(self.text(index)?).ok_or_else(malformed)
    }
}

fn span(value: &Value) -> Result<Option<Duration>> {
    match text(value)? {
        "" => Ok(None),
        micros => micros.parse().map(|micros| Some(Duration::from_micros(micros))).map_err(|_| malformed()),
    }
}

/// Encodes the texts of a hold or a waiter: owner, metadata and trace, each with its length in front (`-` if there is
/// none).
pub(super) fn write_texts(texts: [Option<&str>; 3], into: &mut String) {
    for text in texts {
        match text {
            Some(text) => {
                into.push_str(&text.len().to_string());
                into.push(':');
                into.push_str(text);
            }
            None => into.push('-'),
        }
    }
}

pub(super) fn read_texts(mut written: &str) -> Result<[Option<String>; 3]> {
    let mut texts = [None, None, None];
    for text in &mut texts {
        if let Some(rest) = written.strip_prefix('-') {
            written = rest;
            continue;
        }
        let (length, rest) = written.split_once(':').ok_or_else(malformed)?;
        let length: usize = length.parse().map_err(|_| malformed())?;
        *text = Some(rest.get(..length).ok_or_else(malformed)?.to_owned());
        written = rest.get(length..).ok_or_else(malformed)?;
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_round_trip() {
        for texts in
            [[Some("me"), None, Some("")], [Some("a:b-"), Some("3:x"), None], [Some("é"), Some("-"), Some(":")]]
        {
            let mut written = String::new();
            write_texts(texts, &mut written);
            let read = read_texts(&written).unwrap();
            assert_eq!(read.each_ref().map(Option::as_deref), texts);
        }
        for hostile in ["", "x", "9:a", "1:é--", "99999999999999999999:a"] {
            assert!(read_texts(hostile).is_err(), "{hostile}");
        }
    }
}
