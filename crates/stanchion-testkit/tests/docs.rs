//! The documents say what there is.
#![allow(clippy::unwrap_used, reason = "test code may panic")]

use std::fs;
use std::path::{Path, PathBuf};

/// Texts between single backticks.
fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// What a link is called and where it leads.
fn links(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.match_indices("](").filter_map(|(at, _)| {
        let text = line[..at].rsplit_once('[').map_or(line[..at].trim_start(), |(_, text)| text);
        line[at + 2..].split_once(')').map(|(target, _)| (text, target))
    })
}

/// A text like `subject::case`, as cases of the suite are called.
fn is_like_a_case(text: &str) -> bool {
    let is_name =
        |name: &str| !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit());
    match text.split_once("::") {
        // The library's own paths.
        Some(("stanchion" | "store" | "tower", _)) | None => false,
        Some((subject, name)) => is_name(subject) && is_name(name),
    }
}

/// The name of a heading in links to it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// What is wrong with a link, if anything is.
fn fault_of_link(document: &Path, text: &str, target: &str) -> Option<String> {
    if target.contains("://") {
        return None;
    }
    let (path, fragment) = target.split_once('#').map_or((target, None), |(path, fragment)| (path, Some(fragment)));
    let file: PathBuf = if path.is_empty() { document.into() } else { document.parent().unwrap().join(path) };
    let Ok(content) = fs::read_to_string(&file) else {
        return Some(format!("[{text}]({target}): there is no such file"));
    };
    if let Some(fragment) = fragment {
        let mut headings = content.lines().filter(|line| line.starts_with('#'));
        if !headings.any(|heading| anchor(heading.trim_start_matches('#').trim()) == fragment) {
            return Some(format!("[{text}]({target}): there is no such heading"));
        }
    }
    // A link that is called like code names something that the file has, or the file itself.
    let name = text.strip_prefix('`')?.strip_suffix('`')?;
    let is_file = file.file_stem().is_some_and(|stem| stem == name);
    let has = |before: &str, after: &str| content.contains(&format!("{before}{name}{after}"));
    let is_there = is_file || has("fn ", "(") || has("struct ", " {") || has("", "!(");
    (!is_there).then(|| format!("[{text}]({target}): the file has nothing of this name"))
}

#[test]
fn docs_links_and_case_names_exist() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let cases: Vec<_> =
        stanchion_testkit::cases().iter().map(|case| format!("{}::{}", case.subject, case.name)).collect();
    let (mut checked, mut faults) = (0, Vec::new());
    for name in ["coming-from.md", "features.md"] {
        let document = folder.join(name);
        for (at, line) in fs::read_to_string(&document).unwrap().lines().enumerate() {
            let mut found: Vec<String> = Vec::new();
            for case in code_spans(line).filter(|span| is_like_a_case(span)) {
                checked += 1;
                if !cases.iter().any(|listed| listed == case) {
                    found.push(format!("`{case}` is no case of the suite"));
                }
            }
            for (text, target) in links(line) {
                checked += 1;
                found.extend(fault_of_link(&document, text, target));
            }
            faults.extend(found.into_iter().map(|fault| format!("{name}:{}: {fault}", at + 1)));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(checked > 100, "only {checked} names and links were found");
}
