//! Spans of time as people write them: `30`, `1.5`, `500ms`, `5m`, `1h 30m`.

use std::time::Duration;

/// The shortest span the library takes.
const SHORTEST: Duration = Duration::from_millis(10);
/// The longest span the library takes.
const LONGEST: Duration = Duration::from_hours(30 * 24);

/// A span between 10 ms and 30 days.
pub(crate) fn span(text: &str) -> Result<Duration, String> {
    let span = parse(text)?;
    if span < SHORTEST {
        return Err(format!("`{text}` is too short: the least is 10ms"));
    }
    if span > LONGEST {
        return Err(format!("`{text}` is too long: the most is 30d"));
    }
    Ok(span)
}

/// A span that may also be 0.
pub(crate) fn span_or_zero(text: &str) -> Result<Duration, String> {
    match parse(text)? {
        Duration::ZERO => Ok(Duration::ZERO),
        _ => span(text),
    }
}

fn parse(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("`{text}` is not a duration: write seconds (30, 1.5) or a number with a unit (500ms, 30s, 5m, 2h)");
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds_per_unit = match &text[digits.len()..] {
        "" | "s" | "sec" => 1.0,
        "ms" => 0.001,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return humantime::parse_duration(text).map_err(|_| wrong()),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    match digits.parse::<f64>() {
        // Rounded to a microsecond, so that 0.1s is 100 ms.
        Ok(number) if plain => {
            let micros = (number * seconds_per_unit * 1e6).round();
            // Beyond every limit; which, `span` says.
            Ok(if micros < 1e18 { Duration::from_micros(micros as u64) } else { Duration::MAX })
        }
        _ => humantime::parse_duration(text).map_err(|_| wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn human_durations_are_parsed() {
        let table = [
            ("30", 30_000),
            ("1.5", 1_500),
            ("0.1", 100),
            ("30s", 30_000),
            ("1.5s", 1_500),
            ("500ms", 500),
            ("10ms", 10),
            ("5m", 300_000),
            ("0.5h", 1_800_000),
            ("2h", 7_200_000),
            ("1h 30m", 5_400_000),
            ("30d", 2_592_000_000),
        ];
        for (text, millis) in table {
            assert_eq!(span(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn invalid_durations_are_rejected_with_a_hint() {
        for text in ["", "x", "-1", "1e3", "inf", "nan", "5 parsecs", "--", "1..2", "."] {
            assert!(span(text).unwrap_err().contains("is not a duration"), "{text}");
        }
        for text in ["0", "0s", "9ms", "0.001"] {
            assert!(span(text).unwrap_err().contains("the least is 10ms"), "{text}");
        }
        for text in ["31d", "2592001", "99999999999999999999999999", "10000000000d"] {
            assert!(span(text).unwrap_err().contains("the most is 30d"), "{text}");
        }
    }

    #[test]
    fn only_waits_may_be_zero() {
        assert_eq!(span_or_zero("0"), Ok(Duration::ZERO));
        assert!(span_or_zero("1ms").is_err());
    }
}
