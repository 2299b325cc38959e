//! The authority: its key, its certificate, and the certificates that it issues. Knows no files and no tokens.

use std::time::{Duration, SystemTime};

use contraflow_runtime::random::from_system;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SerialNumber,
};

use super::DAY;

/// How long the authority and the orchestrator's certificate are good.
pub(super) const YEARS_10: Duration = Duration::from_secs(3652 * 86_400);

/// What the authority calls itself; its certificates say so too.
const CA_NAME: &str = "contraflow cluster";

/// The authority of a cluster.
pub(super) struct Authority {
    key: KeyPair,
}

/// A certificate and its key.
pub(super) struct Issued {
    pub(super) certificate: Certificate,
    /// As PEM.
    pub(super) key: String,
}

impl Authority {
    /// A new one.
    ///
    /// **Errors**: the system has no random bytes.
    pub(super) fn new() -> Result<Self, rcgen::Error> {
        Ok(Authority { key: KeyPair::generate()? })
    }

    /// The one of this key, as PEM.
    ///
    /// **Errors**: it is none.
    pub(super) fn of(key: &str) -> Result<Self, rcgen::Error> {
        Ok(Authority { key: KeyPair::from_pem(key)? })
    }

    pub(super) fn key(&self) -> String {
        self.key.serialize_pem()
    }

    /// A certificate of its own: what its key has signed is good with each of them.
    ///
    /// **Errors**: the system has no random bytes.
    pub(super) fn certificate(&self, until: SystemTime) -> Result<Certificate, rcgen::Error> {
        ca_params(until)?.self_signed(&self.key)
    }

    /// Issues the orchestrator's certificate.
    ///
    /// **Errors**: one of the hosts is none.
    pub(super) fn server(&self, hosts: Vec<String>, until: SystemTime) -> Result<Issued, rcgen::Error> {
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        self.issue(CertificateParams::new(hosts)?, "orchestrator", purpose, until)
    }

    /// Issues the certificate of a client or worker.
    ///
    /// **Errors**: the system has no random bytes.
    pub(super) fn member(&self, name: &str, until: SystemTime) -> Result<Issued, rcgen::Error> {
        self.issue(CertificateParams::default(), name, ExtendedKeyUsagePurpose::ClientAuth, until)
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        name: &str,
        purpose: ExtendedKeyUsagePurpose,
        until: SystemTime,
    ) -> Result<Issued, rcgen::Error> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        // The name and the key are all that an issuer's certificate is asked for.
        let issuer = Issuer::new(ca_params(until)?, &self.key);
        let certificate = named(params, name, until)?.signed_by(&key, &issuer)?;
        Ok(Issued { certificate, key: key.serialize_pem() })
    }
}

fn ca_params(until: SystemTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    named(params, CA_NAME, until)
}

fn named(
    mut params: CertificateParams,
    name: &str,
    until: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    // A day back: clocks differ.
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = until.into();
    // Certificates of one key differ in it (RFC 5280, 4.1.2.2); the first bit says that it is positive.
    let mut serial: [u8; 16] = from_system().map_err(|_| rcgen::Error::RingUnspecified)?;
    serial[0] = serial[0] & 0x7F | 0x40;
    params.serial_number = Some(SerialNumber::from(serial.to_vec()));
    Ok(params)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use contraflow_orchestrator::server::CertificateInfo;

    use super::*;

    #[test]
    fn a_certificate_says_until_when_and_for_which_hosts_it_is() {
        let authority = Authority::new().unwrap();
        let hosts = ["localhost", "127.0.0.1", "::1", "node0.example", "2001:db8::7"].map(str::to_owned);
        // Before 2050 and after: the two forms of a time.
        for seconds in [1_900_000_000, 4_000_000_000] {
            let until = UNIX_EPOCH + Duration::from_secs(seconds);
            let server = authority.server(hosts.to_vec(), until).unwrap().certificate;
            let info = CertificateInfo::of(server.der()).unwrap();
            assert_eq!(info, CertificateInfo { expires: seconds, hosts: hosts.to_vec() });
            for certificate in
                [authority.certificate(until).unwrap(), authority.member("ann", until).unwrap().certificate]
            {
                let info = CertificateInfo::of(certificate.der()).unwrap();
                assert_eq!(info, CertificateInfo { expires: seconds, hosts: Vec::new() });
            }
        }
    }

    #[test]
    fn serial_numbers_are_random_and_positive() {
        let authority = Authority::new().unwrap();
        // After the version, an integer of 16 bytes.
        let before = [0xA0, 3, 2, 1, 2, 2, 16];
        let serial = |_| {
            let certificate = authority.certificate(SystemTime::now() + DAY).unwrap();
            let der = certificate.der().to_vec();
            let at = der.windows(before.len()).position(|window| window == before).unwrap() + before.len();
            der[at..at + 16].to_vec()
        };
        let serials: std::collections::BTreeSet<Vec<u8>> = (0..20).map(serial).collect();
        assert_eq!(serials.len(), 20);
        assert!(serials.iter().all(|serial| (1..0x80).contains(&serial[0])));
    }
}
