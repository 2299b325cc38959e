//! What a certificate says of itself: until when it holds, and for which hosts. Reads the DER form (RFC 5280, 4.1) of certificates that are
//! trusted already; knows no signature.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use time::{Date, Month, PrimitiveDateTime, Time};

const SEQUENCE: u8 = 0x30;
const OCTET_STRING: u8 = 0x04;
const OBJECT_ID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// `[0]`: the version, where it is not the first one.
const VERSION: u8 = 0xA0;
/// `[3]`: the extensions.
const EXTENSIONS: u8 = 0xA3;
/// Names of hosts (RFC 5280, 4.2.1.6).
const SUBJECT_ALT_NAME: [u8; 3] = [0x55, 0x1D, 0x11];
const DNS_NAME: u8 = 0x82;
const IP_ADDRESS: u8 = 0x87;

/// What is read of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    /// The end of its validity. **Units**: seconds since 1970.
    pub expires: u64,
    /// Names and addresses of the hosts that it is for, in its order.
    pub hosts: Vec<String>,
}

impl CertificateInfo {
    /// Reads a certificate; `None` if it is none.
    pub fn of(der: &[u8]) -> Option<Self> {
        let certificate = &mut inside(&mut &*der, SEQUENCE)?;
        let fields = &mut inside(certificate, SEQUENCE)?;
        if fields.first() == Some(&VERSION) {
            next(fields)?;
        }
        let [_serial, _algorithm, _issuer] = [next(fields)?, next(fields)?, next(fields)?];
        let validity = &mut inside(fields, SEQUENCE)?;
        let [_begin, (form, end)] = [next(validity)?, next(validity)?];
        let [_subject, _key] = [next(fields)?, next(fields)?];
        let mut hosts = Vec::new();
        while !fields.is_empty() {
            let (tag, mut content) = next(fields)?;
            if tag == EXTENSIONS {
                hosts = hosts_of(&mut inside(&mut content, SEQUENCE)?)?;
            }
        }
        Some(CertificateInfo { expires: seconds(form, std::str::from_utf8(end).ok()?)?, hosts })
    }
}

/// Takes an element off: its tag and its content (X.690, 8.1).
fn next<'a>(der: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&length, rest) = rest.split_first()?;
    let (length, rest) = match length {
        0..=0x7F => (usize::from(length), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length & 0x7F))?;
            (digits.iter().fold(0, |length, &digit| length << 8 | usize::from(digit)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    *der = rest;
    Some((tag, content))
}

/// The content of the next element, if it has this tag.
fn inside<'a>(der: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    next(der).filter(|(found, _)| *found == tag).map(|(_, content)| content)
}

fn hosts_of(extensions: &mut &[u8]) -> Option<Vec<String>> {
    while !extensions.is_empty() {
        let extension = &mut inside(extensions, SEQUENCE)?;
        if inside(extension, OBJECT_ID)? != SUBJECT_ALT_NAME {
            continue;
        }
        // Whether it is critical may come before the value.
        let (tag, mut value) = next(extension)?;
        if tag != OCTET_STRING {
            value = inside(extension, OCTET_STRING)?;
        }
        let names = &mut inside(&mut value, SEQUENCE)?;
        let mut hosts = Vec::new();
        while !names.is_empty() {
            hosts.extend(host(next(names)?));
        }
        return Some(hosts);
    }
    Some(Vec::new())
}

fn host((tag, name): (u8, &[u8])) -> Option<String> {
    match tag {
        DNS_NAME => Some(String::from_utf8_lossy(name).into_owned()),
        IP_ADDRESS => {
            let v4 = <[u8; 4]>::try_from(name).map(|octets| IpAddr::from(Ipv4Addr::from(octets)));
            let v6 = || <[u8; 16]>::try_from(name).map(|octets| IpAddr::from(Ipv6Addr::from(octets)));
            v4.or_else(|_| v6()).ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

/// A time in UTC (RFC 5280, 4.1.2.5): years of two digits are 1950 to 2049. What is before 1970 is 0.
fn seconds(form: u8, text: &str) -> Option<u64> {
    let digits = text.strip_suffix('Z').filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    let (year, rest) = match form {
        UTC_TIME => digits.split_at_checked(2)?,
        GENERALIZED_TIME => digits.split_at_checked(4)?,
        _ => return None,
    };
    let year: i32 = year.parse().ok()?;
    let year = if form == UTC_TIME { year + if year < 50 { 2000 } else { 1900 } } else { year };
    let part = |index: usize| rest.get(2 * index..2 * index + 2)?.parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    let time = Time::from_hms(part(2)?, part(3)?, part(4)?).ok()?;
    let unix = PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp();
    (rest.len() == 10).then(|| u64::try_from(unix).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_those_of_rfc_5280() {
        for (form, text, expected) in [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (UTC_TIME, "500101000000Z", Some(0)),
            (GENERALIZED_TIME, "20500101000000Z", Some(2_524_608_000)),
            (GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799)),
            (UTC_TIME, "260230000000Z", None),
            (UTC_TIME, "260101000000", None),
            (UTC_TIME, "2601010000000Z", None),
            (UTC_TIME, "26+101000000Z", None),
            (0x16, "700101000000Z", None),
        ] {
            assert_eq!(seconds(form, text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_no_certificate(der in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(CertificateInfo::of(&der), None);
        }
    }
}
