//! What the URLs of stores have in common.

use std::borrow::Cow;

/// Returns what may be shown of a text that is or may be the URL of a store: the user, the password and the values of
/// options are replaced by `***`, also if the URL is malformed.
///
/// A text that has none of these is returned as it is.
///
/// ```
/// use stanchion::store::redacted;
///
/// assert_eq!(redacted("redis://user:pa ss@host:6379/0"), "redis://***@host:6379/0");
/// assert_eq!(redacted("postgres://host/db?password=x"), "postgres://host/db?***");
/// assert_eq!(redacted("invoice:42"), "invoice:42");
/// ```
pub fn redacted(text: &str) -> Cow<'_, str> {
    // Nothing is secret without a scheme, or a user before a password.
    let Some(colon) = text.find(':') else { return Cow::Borrowed(text) };
    let is_url = text[colon..].starts_with("://");
    // Without `://` it may begin with the user.
    let start = if is_url { colon + 3 } else { 0 };
    // A password may hold every character, so the user's part ends at the last `@`.
    if let Some(at) = text.rfind('@').filter(|at| *at > colon) {
        return Cow::Owned(format!("{}***{}", &text[..start], without_options(&text[at..], is_url)));
    }
    let rest = &text[start..];
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    if is_url && !authority.split(',').all(is_host) {
        // A user and a password whose `@` is missing.
        return Cow::Owned(format!("{}***", &text[..start]));
    }
    match without_options(rest, is_url) {
        shown if shown.len() == rest.len() => Cow::Borrowed(text),
        shown => Cow::Owned(format!("{}{shown}", &text[..start])),
    }
}

/// Whether it is a host with a port or without one.
fn is_host(text: &str) -> bool {
    let after_address = text.rsplit_once(']').map_or(text, |(_, rest)| rest);
    after_address.split_once(':').is_none_or(|(_, port)| port.chars().all(|c| c.is_ascii_digit()))
}

fn without_options(text: &str, is_url: bool) -> String {
    match text.split_once('?') {
        Some((before, options)) if is_url || options.contains('=') => format!("{before}?***"),
        _ => text.to_owned(),
    }
}

/// The bytes that a text with `%XX` stands for; none if a `%` is not followed by two hexadecimal digits.
#[cfg(any(feature = "firestore", feature = "postgres", feature = "redis", feature = "sqlite"))]
pub(super) fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        };
        decoded.push(byte);
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_passwords_and_options_are_not_shown() {
        let table = [
            ("redis://u:s3ntinel@h:1/0", "redis://***@h:1/0"),
            ("redis://s3ntinel@h", "redis://***@h"),
            ("redis://u:a@s3ntinel@h", "redis://***@h"),
            ("redis://u:a/s3ntinel?x#y@h/0", "redis://***@h/0"),
            ("redis://u:s3 nti'nel\"x@h", "redis://***@h"),
            ("--store=redis://u:s3ntinel@h", "--store=redis://***@h"),
            ("redis:u:s3ntinel@h", "***@h"),
            ("redis:/u:s3ntinel@h", "***@h"),
            ("u:s3ntinel@h", "***@h"),
            (":s3ntinel@h", "***@h"),
            ("redis://:s3ntinel", "redis://***"),
            ("redis://u:s3ntinel/0", "redis://***"),
            ("redis://u:s3ntinel%40h", "redis://***"),
            ("postgres://h/db?password=s3ntinel", "postgres://h/db?***"),
            ("postgres://u@h/db?password=s3ntinel", "postgres://***@h/db?***"),
            ("sqlite:/a?key=s3ntinel", "sqlite:/a?***"),
        ];
        for (text, shown) in table {
            assert_eq!(redacted(text), shown, "{text}");
        }
        let harmless = [
            "invoice:42",
            "who?",
            "user@example.com",
            "redis://h:6379,h2/0",
            "redis://[::1]:6379",
            "sqlite:/a b",
            "git@github.com:a/b",
            "",
            ":",
            "://",
        ];
        for text in harmless {
            assert_eq!(redacted(text), text);
        }
    }
}
