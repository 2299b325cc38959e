//! Texts of others, made fit to keep and to show: bounded, and without characters that act on a terminal or forge a line of a
//! log. Pure; which text may be how long is not known here.

use std::borrow::Cow;

/// What stands at the end of a text that was cut.
const CUT: &str = "...";

/// Whether a character does something other than being shown: C0, DEL and C1 (Unicode category Cc), separators of lines and
/// paragraphs, and those that change the direction of the text around them.
pub fn is_control(c: char) -> bool {
    let acts_on_text = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || acts_on_text
}

/// The text with its control characters written out: `\n`, `\u{1b}`. A text without any stays as it is, so that doing it twice
/// changes nothing.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_control(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

/// The text in a printable form of at most `most` bytes; what is longer ends with "...".
pub fn tidy(text: &mut String, most: usize) {
    if text.contains(is_control) {
        // A little more than is kept, so that what is cut here is seen to be cut below.
        *text = printable(cut(text, most + 4)).into_owned();
    }
    if text.len() > most {
        let kept = cut(text, most.saturating_sub(CUT.len())).len();
        text.truncate(kept);
        text.push_str(CUT);
    }
}

/// The longest beginning of at most `most` bytes.
fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_are_written_out_and_all_others_stay() {
        for (text, shown) in [
            ("plain: größer, 東京, \\n", "plain: größer, 東京, \\n"),
            ("a\u{1b}[31mb\nc\rd\te", "a\\u{1b}[31mb\\nc\\rd\\te"),
            ("\u{0}\u{7f}\u{9b}2J", "\\u{0}\\u{7f}\\u{9b}2J"),
            ("user\u{202e}gpj.exe\u{2028}", "user\\u{202e}gpj.exe\\u{2028}"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        for (text, most, left) in [
            ("abcdef", 6, "abcdef"),
            ("abcdefg", 6, "abc..."),
            ("ääää", 6, "ä..."),
            ("\n\n\n", 6, "\\n\\n\\n"),
            ("\n\n\n\n", 6, "\\n\\..."),
        ] {
            let mut text = text.to_owned();
            tidy(&mut text, most);
            assert_eq!(text, left);
        }
    }

    proptest! {
        #[test]
        fn a_tidy_text_is_bounded_printable_and_stays(text in any::<String>(), most in 3_usize..80) {
            let mut once = text.clone();
            tidy(&mut once, most);
            prop_assert!(once.len() <= most && !once.contains(is_control), "{once:?}");
            let mut twice = once.clone();
            tidy(&mut twice, most);
            prop_assert_eq!(&twice, &once);
            if text.len() <= most && !text.contains(is_control) {
                prop_assert_eq!(once, text);
            }
        }
    }
}
