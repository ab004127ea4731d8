//! Helpers for the URLs of all stores: redacting secrets and percent-decoding.

use std::borrow::Cow;

/// Replaces the user, the password and the options in the URL of a store with `***`, so that it can be shown.
///
/// This works for malformed URLs too. A text without these parts is returned unchanged.
///
/// ```
/// use stanchion::store::redacted;
///
/// assert_eq!(redacted("redis://user:pa ss@host:6379/0"), "redis://***@host:6379/0");
/// assert_eq!(redacted("postgres://host/db?password=x"), "postgres://host/db?***");
/// assert_eq!(redacted("invoice:42"), "invoice:42");
/// ```
pub fn redacted(text: &str) -> Cow<'_, str> {
    // Without a colon the text has neither a scheme nor a password after a user name, so nothing in it is secret.
    let Some(colon) = text.find(':') else { return Cow::Borrowed(text) };
    let is_url = text[colon..].starts_with("://");
    // Without `://` the text may begin with the user.
    let start = if is_url { colon + 3 } else { 0 };
    // A password may contain any character, so the part with the user ends at the last `@`.
    if let Some(at) = text.rfind('@').filter(|at| *at > colon) {
        return Cow::Owned(format!("{}***{}", &text[..start], without_options(&text[at..], is_url)));
    }
    let rest = &text[start..];
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    if is_url && !authority.split(',').all(is_host) {
        // This is probably a user and a password whose `@` is missing.
        return Cow::Owned(format!("{}***", &text[..start]));
    }
    match without_options(rest, is_url) {
        shown if shown.len() == rest.len() => Cow::Borrowed(text),
        shown => Cow::Owned(format!("{}{shown}", &text[..start])),
    }
}

/// Returns whether the text is a host, with or without a port.
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

/// Decodes `%XX` in a text to bytes. Returns `None` if a `%` is not followed by two hexadecimal digits.
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
    fn users_passwords_and_options_are_redacted() {
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
