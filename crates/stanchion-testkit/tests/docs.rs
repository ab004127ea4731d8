//! Checks that the files, headings, tests and cases that `docs/` mentions exist.
#![allow(clippy::unwrap_used, reason = "test code may panic")]

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the texts between single backticks.
fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Returns the text and the target of each link.
fn links(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.match_indices("](").filter_map(|(at, _)| {
        let text = line[..at].rsplit_once('[').map_or(line[..at].trim_start(), |(_, text)| text);
        line[at + 2..].split_once(')').map(|(target, _)| (text, target))
    })
}

/// Returns whether a text looks like the name of a case: `subject::case`.
fn is_like_a_case(text: &str) -> bool {
    let is_name =
        |name: &str| !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit());
    match text.split_once("::") {
        // Paths of the library itself.
        Some(("stanchion" | "store" | "tower", _)) | None => false,
        Some((subject, name)) => is_name(subject) && is_name(name),
    }
}

/// Returns the fragment that links to a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// Returns the error in a link, if there is one.
fn link_error(document: &Path, text: &str, target: &str) -> Option<String> {
    if target.contains("://") {
        return None;
    }
    let (path, fragment) = target.split_once('#').map_or((target, None), |(path, fragment)| (path, Some(fragment)));
    let file: PathBuf = if path.is_empty() { document.into() } else { document.parent().unwrap().join(path) };
    let Ok(content) = fs::read_to_string(&file) else {
        return Some(format!("[{text}]({target}): the file does not exist"));
    };
    if let Some(fragment) = fragment {
        let mut headings = content.lines().filter(|line| line.starts_with('#'));
        if !headings.any(|heading| anchor(heading.trim_start_matches('#').trim()) == fragment) {
            return Some(format!("[{text}]({target}): the file has no such heading"));
        }
    }
    // If the text of a link is code, it names an item of the file or the file itself.
    let name = text.strip_prefix('`')?.strip_suffix('`')?;
    let is_file = file.file_stem().is_some_and(|stem| stem == name);
    let has = |before: &str, after: &str| content.contains(&format!("{before}{name}{after}"));
    let exists = is_file || has("fn ", "(") || has("struct ", " {") || has("", "!(");
    (!exists).then(|| format!("[{text}]({target}): the file has no item of this name"))
}

#[test]
fn docs_links_and_case_names_exist() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let cases: Vec<_> =
        stanchion_testkit::cases().iter().map(|case| format!("{}::{}", case.subject, case.name)).collect();
    let (mut checked, mut errors) = (0, Vec::new());
    for name in ["coming-from.md", "features.md"] {
        let document = folder.join(name);
        for (at, line) in fs::read_to_string(&document).unwrap().lines().enumerate() {
            let mut found: Vec<String> = Vec::new();
            for case in code_spans(line).filter(|span| is_like_a_case(span)) {
                checked += 1;
                if !cases.iter().any(|listed| listed == case) {
                    found.push(format!("the suite has no case `{case}`"));
                }
            }
            for (text, target) in links(line) {
                checked += 1;
                found.extend(link_error(&document, text, target));
            }
            errors.extend(found.into_iter().map(|error| format!("{name}:{}: {error}", at + 1)));
        }
    }
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    assert!(checked > 100, "only {checked} names and links were checked");
}
