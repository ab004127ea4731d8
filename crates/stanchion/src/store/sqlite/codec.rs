//! Encodes and decodes the pushes between processes: one datagram for each push, in a versioned binary format.
//!
//! A datagram has the fields `version kind token`, followed by `fence key` for a grant, or by `key reason` for a
//! force-release. Numbers are little-endian, and each text begins with its length. The receiver drops a datagram that
//! does not parse to the last byte, because a push is only a hint.

use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, Push};
use crate::token::TokenId;

/// Maximum length of a datagram in bytes: a key, a namespace, the longest reason, and the header.
pub(super) const MAX_DATAGRAM: usize = 8 * 1024;

/// Version of the format.
const VERSION: u8 = 1;
/// Maximum length of the reason in a datagram, in bytes.
const MAX_REASON: usize = 4 * 1024;

/// Encodes a push.
pub(super) fn encode(push: &Push) -> Vec<u8> {
    let mut out = vec![VERSION];
    match push {
        Push::Granted { key, token, fence } => {
            out.push(1);
            out.extend_from_slice(token.as_bytes());
            out.extend_from_slice(&fence.get().to_le_bytes());
            put_text(&mut out, key.as_encoded());
        }
        Push::ForceReleased(lost) => {
            out.push(2);
            out.extend_from_slice(lost.token.as_bytes());
            put_text(&mut out, lost.key.as_encoded());
            put_text(&mut out, cut(&lost.reason));
        }
        Push::Recheck { token } => {
            out.push(3);
            out.extend_from_slice(token.as_bytes());
        }
        Push::RecheckAll => out.push(4),
        Push::VerifyAll => out.push(5),
        Push::Warning(message) => {
            out.push(6);
            put_text(&mut out, message);
        }
        // A program from before this kind ignores it.
        Push::Recall { token } => {
            out.push(7);
            out.extend_from_slice(token.as_bytes());
        }
    }
    out
}

/// Decodes a push. Returns `None` if the datagram is not valid.
pub(super) fn decode(datagram: &[u8]) -> Option<Push> {
    let mut rest = datagram;
    let [version, kind] = take(&mut rest)?;
    if version != VERSION {
        return None;
    }
    let push = match kind {
        1 => {
            let token = TokenId::from_bytes(take(&mut rest)?);
            let fence = Fence::new(u64::from_le_bytes(take(&mut rest)?));
            Push::Granted { key: take_key(&mut rest)?, token, fence }
        }
        2 => {
            let token = TokenId::from_bytes(take(&mut rest)?);
            let key = take_key(&mut rest)?;
            Push::ForceReleased(LostToken { key, token, reason: take_text(&mut rest)?.to_owned() })
        }
        3 => Push::Recheck { token: TokenId::from_bytes(take(&mut rest)?) },
        4 => Push::RecheckAll,
        5 => Push::VerifyAll,
        6 => Push::Warning(take_text(&mut rest)?.to_owned()),
        7 => Push::Recall { token: TokenId::from_bytes(take(&mut rest)?) },
        _ => return None,
    };
    rest.is_empty().then_some(push)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Shortens a reason to the maximum length. The session reads the full reason from the store when it renews.
fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::from(u16::from_le_bytes(take(rest)?));
    let (text, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    std::str::from_utf8(text).ok()
}

fn take_key(rest: &mut &[u8]) -> Option<Key> {
    Key::from_encoded(take_text(rest)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pushes() -> Vec<Push> {
        let key = Key::new("billing", &"ü".repeat(256)).unwrap();
        let token = TokenId::from_bytes([7; 16]);
        vec![
            Push::Granted { key: key.clone(), token, fence: Fence::new(u64::MAX) },
            Push::ForceReleased(LostToken { key, token, reason: "because".into() }),
            Push::Recheck { token },
            Push::RecheckAll,
            Push::VerifyAll,
            Push::Warning("slow".into()),
            Push::Recall { token },
        ]
    }

    #[test]
    fn pushes_survive_encoding() {
        for push in pushes() {
            assert_eq!(decode(&encode(&push)), Some(push));
        }
    }

    #[test]
    fn invalid_datagrams_are_ignored() {
        for push in pushes() {
            let whole = encode(&push);
            for end in 0..whole.len() {
                assert_eq!(decode(&whole[..end]), None, "cut at {end} of {push:?}");
            }
            let mut long = whole.clone();
            long.push(0);
            assert_eq!(decode(&long), None);
            let mut newer = whole.clone();
            newer[0] = 2;
            assert_eq!(decode(&newer), None);
        }
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(&[VERSION, 9]), None);
        assert_eq!(decode(&[0xff; 300]), None);
        // The key of this grant is not UTF-8.
        let mut forged = vec![VERSION, 1];
        forged.extend_from_slice(&[0; 24]);
        forged.extend_from_slice(&[2, 0, 0xc3, 0x28]);
        assert_eq!(decode(&forged), None);
    }

    #[test]
    fn long_reasons_are_cut_between_characters() {
        let key = Key::new("", "k").unwrap();
        let push =
            Push::ForceReleased(LostToken { key, token: TokenId::from_bytes([1; 16]), reason: "€".repeat(5_000) });
        let datagram = encode(&push);
        assert!(datagram.len() <= MAX_DATAGRAM);
        match decode(&datagram) {
            Some(Push::ForceReleased(lost)) => assert_eq!(lost.reason, "€".repeat(1365)),
            other => panic!("{other:?}"),
        }
    }
}
