//! Parses durations as people write them: `30`, `1.5`, `500ms`, `5m`, `1h 30m`.

use std::time::Duration;

/// Parses a duration. Returns `None` if the text is not one.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    if let Some(seconds) = number(text) {
        return scaled(seconds, 1.0);
    }
    let mut sum = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let (digits, after) = rest.split_at(rest.find(|c: char| c.is_ascii_alphabetic())?);
        let (unit, after) = after.split_at(after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len()));
        let seconds = match unit {
            "ms" => 0.001,
            "s" | "sec" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3_600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        sum = sum.checked_add(scaled(number(digits)?, seconds)?)?;
        rest = after.trim_start();
    }
    Some(sum)
}

/// Parses digits with at most one point among them. Rejects signs, exponents and words for infinity.
fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.').then(|| text.parse().ok())?
}

/// Multiplies and rounds to a microsecond, so that 0.1s is 100 ms.
fn scaled(number: f64, seconds: f64) -> Option<Duration> {
    let micros = (number * seconds * 1e6).round();
    (micros < 1e18).then(|| Duration::from_micros(micros as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_parse_in_all_documented_forms() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("30", ms(30_000)),
            ("1.5", ms(1_500)),
            ("500ms", ms(500)),
            ("0.1s", ms(100)),
            ("5m", ms(300_000)),
            ("1h 30m", ms(5_400_000)),
            ("1h30min", ms(5_400_000)),
            (" 2 d ", ms(172_800_000)),
            ("0", ms(0)),
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
        for wrong in ["", " ", "five", "5 minutes", "-1s", "1e3", "s", "5mm", "1.2.3s", "inf", "9999999999999d", "5s 3"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
