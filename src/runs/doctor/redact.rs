//! Takes out of a text what may be a secret: what follows a word such as `token`, user and password of an address, what signs it,
//! words that look drawn at random, and private keys. Rather too much than too little; knows no file.

/// What stands in its place.
const MARK: &str = "[redacted]";

/// Parts of names after which a secret may stand.
const NAMES: [&str; 10] = [
    "token",
    "secret",
    "password",
    "passwd",
    "credential",
    "authorization",
    "bearer",
    "apikey",
    "accesskey",
    "privatekey",
];

/// A word as long as this, of letters and digits, may be drawn at random.
const RANDOM: usize = 20;

/// A text without what may be a secret, line by line.
pub(super) fn redacted(text: &str) -> String {
    let mut in_key = false;
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let begins = line.contains("-----BEGIN ") && !line.contains("-----BEGIN CERTIFICATE");
        if begins && !in_key {
            out.push_str(MARK);
            out.push('\n');
        }
        in_key |= begins;
        if !in_key {
            out.push_str(&line_redacted(line));
        }
        in_key &= !line.contains("-----END ");
    }
    out
}

fn line_redacted(line: &str) -> String {
    let is_border =
        |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | '[' | ']' | '{' | '}' | '(' | ')');
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    // The word before was a name of a secret: the next one is the secret.
    let mut is_next = false;
    while !rest.is_empty() {
        let border = rest.find(|c| !is_border(c)).unwrap_or(rest.len());
        out.push_str(&rest[..border]);
        rest = &rest[border..];
        // In quotes a secret may be of several words.
        let quote = out.chars().next_back().filter(|&c| is_next && matches!(c, '"' | '\''));
        let end = quote.map_or_else(|| rest.find(is_border), |quote| rest.find(quote));
        let end = end.unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        if word.is_empty() {
            continue;
        }
        if matches!(word.trim(), "=" | ":") {
            out.push_str(word);
        } else if is_next {
            // `authorization: Bearer x`: the kind stands between.
            is_next = names_secret(word);
            out.push_str(MARK);
        } else {
            let (shown, names) = word_redacted(word);
            out.push_str(&shown);
            is_next = names;
        }
    }
    out
}

/// A word as it is shown, and whether the next one is a secret.
fn word_redacted(word: &str) -> (String, bool) {
    if let Some((scheme, address)) = word.split_once("://") {
        // What comes before `@` in the authority are user and password.
        let (authority, path) = address.split_at(address.find(['/', '?']).unwrap_or(address.len()));
        let host = authority
            .rsplit_once('@')
            .map_or_else(|| authority.to_owned(), |(_, host)| format!("{MARK}@{host}"));
        let (path, query) = path.split_once('?').map_or((path, ""), |(path, _)| (path, MARK));
        let sign = if query.is_empty() { "" } else { "?" };
        let path: Vec<String> = path.split('/').map(random_redacted).collect();
        return (format!("{scheme}://{host}{}{sign}{query}", path.join("/")), false);
    }
    if let Some((name, value)) = word.split_once(['=', ':'])
        && names_secret(name)
    {
        let sign = &word[name.len()..=name.len()];
        return if value.is_empty() {
            (word.to_owned(), true)
        } else {
            (format!("{name}{sign}{MARK}"), false)
        };
    }
    let parts: Vec<String> = word.split('/').map(random_redacted).collect();
    (parts.join("/"), names_secret(word))
}

/// Whether something secret may follow. Words for people go on with other words: only a name alone is one.
fn names_secret(word: &str) -> bool {
    let plain: String = word.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_lowercase();
    NAMES.iter().any(|name| plain.ends_with(name))
}

fn random_redacted(word: &str) -> String {
    let is_code = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '=' | '_' | '-');
    let has = |kind: fn(&char) -> bool| word.chars().any(|c| kind(&c));
    let is_random = word.len() >= RANDOM
        && word.chars().all(is_code)
        && has(char::is_ascii_digit)
        && has(char::is_ascii_alphabetic);
    if is_random { MARK.to_owned() } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_secret_is_taken_out_and_the_rest_stays() {
        for (text, shown) in [
            ("token = \"abc\"\n", "token = \"[redacted]\"\n"),
            ("{\"password\": \"x y\"}", "{\"password\": \"[redacted]\"}"),
            ("{\"token\":\"x y\",\"a\":1}", "{\"token\":\"[redacted]\",\"a\":1}"),
            ("AWS_SECRET_ACCESS_KEY=abc def", "AWS_SECRET_ACCESS_KEY=[redacted] def"),
            ("Authorization: Bearer abc", "Authorization: [redacted] [redacted]"),
            ("s3://user:pass@host/a/b?sig=1&x=2 next", "s3://[redacted]@host/a/b?[redacted] next"),
            ("https://host/a", "https://host/a"),
            ("at /home/me/0123456789abcdef0123456789abcdef/x", "at /home/me/[redacted]/x"),
            ("AKIAIOSFODNN7EXAMPLE", "[redacted]"),
            ("a\n-----BEGIN PRIVATE KEY-----\nMIIabc\n-----END PRIVATE KEY-----\nb\n", "a\n[redacted]\nb\n"),
            ("checkpoints/step-00000008: whole, 3 shards", "checkpoints/step-00000008: whole, 3 shards"),
            ("mtp_loss_of_the_second_depth 1.5e-3", "mtp_loss_of_the_second_depth 1.5e-3"),
        ] {
            assert_eq!(redacted(text), shown, "{text}");
        }
    }
}
