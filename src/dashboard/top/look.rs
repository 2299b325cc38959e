//! How things look on some terminal: colours as many as it has, glyphs that it can show. Pure.
//!
//! Text stays in the terminal's own colours, so that it can be read on a dark and on a light one.

use contraflow_runtime::simulator::Shade;
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::bar;

/// Colours of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// None at all.
    None,
    /// The 256 of xterm.
    Indexed,
    /// All.
    True,
}

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its colours.
    pub colours: Colours,
    /// Whether it shows more than ASCII.
    pub is_unicode: bool,
}

impl Look {
    /// By the environment's variables.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        // The first of them that is set decides, as in POSIX.
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(variable).unwrap_or_default();
        let locale = locale.to_lowercase();
        let has_all = variable("COLORTERM").is_some_and(|value| value == "truecolor" || value == "24bit");
        let is_dumb = variable("TERM").is_none_or(|term| term == "dumb");
        let colours = match has_all {
            _ if is_dumb || variable("NO_COLOR").is_some() => Colours::None,
            true => Colours::True,
            false => Colours::Indexed,
        };
        Look { colours, is_unicode: locale.contains("utf-8") || locale.contains("utf8") }
    }

    /// A cell of a timeline: a block in the colour of what ran, its letter where there are no colours, a dot where nothing ran.
    pub fn cell(self, shade: Option<Shade>) -> (&'static str, Style) {
        let Some(shade) = shade else { return (if self.is_unicode { "·" } else { "." }, self.dim()) };
        match (self.colours, self.is_unicode) {
            (Colours::None, _) => (letter(shade), Style::new()),
            (_, true) => ("▆", Style::new().fg(self.colour(shade))),
            (_, false) => {
                (letter(shade), Style::new().fg(self.colour(shade)).add_modifier(Modifier::REVERSED))
            }
        }
    }

    /// The palette's colour. Its black is the terminal's own: it would not be seen on a dark one.
    fn colour(self, shade: Shade) -> Color {
        let hex = u32::from_str_radix(shade.colour().trim_start_matches('#'), 16).unwrap_or(0);
        let [_, red, green, blue] = hex.to_be_bytes();
        match self.colours {
            _ if hex == 0 => Color::Reset,
            Colours::None => Color::Reset,
            Colours::Indexed => Color::Indexed(indexed(red, green, blue)),
            Colours::True => Color::Rgb(red, green, blue),
        }
    }

    /// Of a curve.
    pub fn curve(self) -> Style {
        Style::new().fg(self.colour(Shade::ForwardBackward))
    }

    /// Of what is there to be looked up.
    pub fn dim(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    /// Of what should be seen first.
    pub fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// Of what is wrong.
    pub fn warning(self) -> Style {
        match self.colours {
            Colours::None => self.strong(),
            _ => self.strong().fg(Color::Red),
        }
    }

    /// Bars in eighths of a character, or what comes near to that.
    pub fn bars(self) -> bar::Set<'static> {
        if self.is_unicode {
            return bar::NINE_LEVELS;
        }
        bar::Set {
            full: "#",
            seven_eighths: "#",
            three_quarters: "=",
            five_eighths: "=",
            half: "-",
            three_eighths: "-",
            one_quarter: ".",
            one_eighth: ".",
            empty: " ",
        }
    }

    /// A bar of one character for a share of the whole.
    pub fn bar(self, share: f64) -> &'static str {
        let set = self.bars();
        let levels = [
            set.one_eighth,
            set.one_quarter,
            set.three_eighths,
            set.half,
            set.five_eighths,
            set.three_quarters,
            set.seven_eighths,
            set.full,
        ];
        levels[(share.clamp(0.0, 1.0) * 7.0).round() as usize]
    }

    /// Between two values, of which one follows the other.
    pub fn arrow(self) -> &'static str {
        if self.is_unicode { "→" } else { "->" }
    }
}

/// What stands for a shade where there are no colours: as in the text form of plans, where it is there.
pub fn letter(shade: Shade) -> &'static str {
    match shade {
        Shade::ForwardBackward => "&",
        Shade::Dispatch => "d",
        Shade::Combine => "c",
        Shade::Optimizer => "o",
        Shade::Transfer => "t",
        other => other.name(),
    }
}

/// The nearest of the 6 x 6 x 6 colours of xterm's cube.
fn indexed(red: u8, green: u8, blue: u8) -> u8 {
    const LEVELS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let near = |value: u8| {
        let places = (0_u8..).zip(LEVELS);
        places.min_by_key(|(_, level)| level.abs_diff(value)).map_or(0, |(place, _)| place)
    };
    16 + 36 * near(red) + 6 * near(green) + near(blue)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Look {
        Look::of(|name| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn colours_and_glyphs_are_those_that_the_environment_promises() {
        let base = [("TERM", "xterm"), ("LANG", "de_DE.UTF-8")];
        let with = |more: &[(&'static str, &'static str)]| of(&[more, &base].concat());
        assert_eq!(with(&[]), Look { colours: Colours::Indexed, is_unicode: true });
        assert_eq!(with(&[("COLORTERM", "truecolor")]).colours, Colours::True);
        assert_eq!(with(&[("COLORTERM", "truecolor"), ("NO_COLOR", "1")]).colours, Colours::None);
        assert_eq!(with(&[("NO_COLOR", "")]).colours, Colours::Indexed);
        assert_eq!(with(&[("TERM", "dumb")]).colours, Colours::None);
        assert!(!with(&[("LC_ALL", "C")]).is_unicode && with(&[("LC_ALL", "")]).is_unicode);
        assert_eq!(of(&[]), Look { colours: Colours::None, is_unicode: false });
    }

    #[test]
    fn blocks_have_the_colours_of_every_other_picture_and_letters_where_there_are_none() {
        let look = |colours, is_unicode| Look { colours, is_unicode };
        let forward = Some(Shade::Forward);
        let (glyph, style) = look(Colours::True, true).cell(forward);
        assert_eq!((glyph, style.fg), ("▆", Some(Color::Rgb(0x56, 0xb4, 0xe9))));
        // 95, 175 and 215 are the cube's nearest levels: 1, 3 and 4.
        assert_eq!(look(Colours::Indexed, true).cell(forward).1.fg, Some(Color::Indexed(16 + 36 + 18 + 4)));
        assert_eq!(look(Colours::None, true).cell(forward), ("F", Style::new()));
        // Black would not be seen on a dark terminal.
        assert_eq!(look(Colours::True, true).cell(Some(Shade::Optimizer)).1.fg, Some(Color::Reset));
        let letters: std::collections::BTreeSet<&str> = Shade::ALL.map(letter).into();
        assert_eq!(letters.len(), Shade::ALL.len());
        assert!(letters.iter().all(|letter| letter.len() == 1));
    }
}
