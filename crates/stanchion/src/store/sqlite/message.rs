//! Pushes between processes: one datagram each, in a small versioned binary form.
//!
//! `version kind token`, then for a grant `fence key`, for a forced release `key reason`. Numbers are little-endian,
//! texts have their length before them. What does not parse to the last byte is dropped: a push is a hint.

use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, Push};
use crate::token::TokenId;

/// Room for the longest datagram: a key, a namespace, the longest reason, and the head.
pub(super) const LONGEST: usize = 8 * 1024;

const VERSION: u8 = 1;
const LONGEST_REASON: usize = 4 * 1024;

/// The datagram of a push.
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
    }
    out
}

/// The push of a datagram, if it is one.
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
        _ => return None,
    };
    rest.is_empty().then_some(push)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The reason in full is in the store; a datagram carries its beginning.
fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(LONGEST_REASON);
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
        ]
    }

    #[test]
    fn a_push_survives_its_datagram() {
        for push in pushes() {
            assert_eq!(decode(&encode(&push)), Some(push));
        }
    }

    #[test]
    fn hostile_short_and_long_datagrams_are_ignored() {
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
        // A text that is not UTF-8, and a key that is none.
        let mut forged = vec![VERSION, 1];
        forged.extend_from_slice(&[0; 24]);
        forged.extend_from_slice(&[2, 0, 0xc3, 0x28]);
        assert_eq!(decode(&forged), None);
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let key = Key::new("", "k").unwrap();
        let push =
            Push::ForceReleased(LostToken { key, token: TokenId::from_bytes([1; 16]), reason: "€".repeat(5_000) });
        let datagram = encode(&push);
        assert!(datagram.len() <= LONGEST);
        match decode(&datagram) {
            Some(Push::ForceReleased(lost)) => assert_eq!(lost.reason, "€".repeat(1365)),
            other => panic!("{other:?}"),
        }
    }
}
