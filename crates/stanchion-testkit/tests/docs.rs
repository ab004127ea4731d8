//! Checks that the links and names in the pages lead to something.
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

/// Returns whether a text looks like the name of a case of the suite, `subject::case`.
fn is_like_a_case(text: &str) -> bool {
    let is_name =
        |name: &str| !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit());
    match text.split_once("::") {
        // Paths of the library itself.
        Some(("stanchion" | "store" | "tower", _)) | None => false,
        Some((subject, name)) => is_name(subject) && is_name(name),
    }
}

/// Returns the fragment by which links name a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// Returns the problem of a link, if it has one.
fn fault_of_link(document: &Path, text: &str, target: &str) -> Option<String> {
    if target.contains("://") {
        return None;
    }
    let (path, fragment) = target.split_once('#').map_or((target, None), |(path, fragment)| (path, Some(fragment)));
    let file: PathBuf = if path.is_empty() { document.into() } else { document.parent().unwrap().join(path) };
    if file.is_dir() {
        return None;
    }
    let Ok(content) = fs::read_to_string(&file) else {
        return Some(format!("[{text}]({target}): the file does not exist"));
    };
    if let Some(fragment) = fragment {
        let mut headings = content.lines().filter(|line| line.starts_with('#'));
        if !headings.any(|heading| anchor(heading.trim_start_matches('#').trim()) == fragment) {
            return Some(format!("[{text}]({target}): the file has no such heading"));
        }
    }
    // If the text of a link is code, the file must define that name, or have it as its own name.
    let name = text.strip_prefix('`')?.strip_suffix('`')?;
    let is_file = file.file_stem().is_some_and(|stem| stem == name);
    let has = |before: &str, after: &str| content.contains(&format!("{before}{name}{after}"));
    let is_there = is_file || has("fn ", "(") || has("struct ", " {") || has("", "!(");
    (!is_there).then(|| format!("[{text}]({target}): the file does not define this name"))
}

/// Returns the Markdown pages of a folder and of the folders in it.
fn pages_in(folder: &Path) -> Vec<PathBuf> {
    let mut pages = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            pages.extend(pages_in(&path));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    pages
}

#[test]
fn docs_links_and_case_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cases: Vec<_> =
        stanchion_testkit::cases().iter().map(|case| format!("{}::{}", case.subject, case.name)).collect();
    let mut pages = pages_in(&root.join("docs"));
    pages.extend(
        ["README.md", "DESIGN.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"].map(|name| root.join(name)),
    );
    pages.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("BEHAVIOURS.md"));
    let (mut checked, mut faults) = (0, Vec::new());
    for page in pages {
        for (at, line) in fs::read_to_string(&page).unwrap().lines().enumerate() {
            let mut found: Vec<String> = Vec::new();
            for case in code_spans(line).filter(|span| is_like_a_case(span)) {
                checked += 1;
                if !cases.iter().any(|listed| listed == case) {
                    found.push(format!("`{case}` is not a case of the suite"));
                }
            }
            for (text, target) in links(line) {
                checked += 1;
                found.extend(fault_of_link(&page, text, target));
            }
            let name = page.strip_prefix(&root).unwrap_or(&page).display();
            faults.extend(found.into_iter().map(|fault| format!("{name}:{}: {fault}", at + 1)));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(checked > 100, "only {checked} names and links were found");
}
