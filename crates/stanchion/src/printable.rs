//! Decides which characters can be shown unescaped.

/// Returns whether a character is visible and unambiguous: it does not steer a terminal, reverse the text direction or
/// hide, and it is no blank other than the plain space.
///
/// For keys in messages and for the tool. Not part of the API.
#[doc(hidden)]
pub fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let is_hidden = c.is_control()
        || c.is_whitespace()
        || matches!(c,
            // Soft hyphen, joiners, direction marks and overrides, fillers, selectors: terminals draw nothing for them.
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            // The empty Braille pattern, and more fillers and selectors.
            | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            // Interlinear annotations, and code points that are not characters.
            | '\u{fff0}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            // Tags and more selectors.
            | '\u{e0000}'..='\u{e0fff}');
    !is_hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misleading_characters_are_not_printable() {
        let hidden = "\0\u{1b}\t\n\u{7f}\u{80}\u{85}\u{9b}\u{a0}\u{ad}\u{34f}\u{61c}\u{115f}\u{1160}\u{1680}\u{17b4}\u{180e}\u{2000}\
             \u{200b}\u{200d}\u{200e}\u{2028}\u{202e}\u{202f}\u{205f}\u{2060}\u{2066}\u{206f}\u{2800}\u{3000}\u{3164}\u{fe0f}\u{feff}\
             \u{ffa0}\u{fff9}\u{fffb}\u{e0001}\u{e0041}\u{e007f}\u{e0100}";
        for c in hidden.chars() {
            assert!(!is_printable(c), "{c:?}");
        }
        for c in " aZ~\\é漢ا🔒‘’—\u{fffd}e\u{301}".chars() {
            assert!(is_printable(c), "{c:?}");
        }
    }
}
