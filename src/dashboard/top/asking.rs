//! What is asked for one frame, request by request. What is large and changes little is asked for less often.

use super::answers::{About, Experts, Incidents, Overview, Text};
use super::link::{Link, Trouble};
use super::view::{Event, Run};

/// Points of a curve: more than a wide terminal has columns.
const POINTS: usize = 400;

/// Of so many questions one asks for what is large, too.
const LARGE_EVERY: u64 = 4;

/// Asks again and again.
pub struct Asking {
    link: Link,
    count: u64,
    /// What was answered last about the run that is open.
    known: Option<Box<Run>>,
}

impl Asking {
    /// Over this connection.
    pub fn new(link: Link) -> Self {
        Asking { link, count: 0, known: None }
    }

    /// What there is, and what is known of `open`, an id or a name.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn ask(&mut self, open: Option<&str>) -> Result<Event, Trouble> {
        let about: About = self.link.get("/api/v1").await?;
        let run = match open {
            None => None,
            Some(open) => {
                let named = about.runs.iter().find(|entry| &*entry.id == open);
                let named = named.or_else(|| about.runs.iter().find(|entry| &*entry.name == open));
                let id = named.map_or_else(|| open.into(), |entry| entry.id.clone());
                Some(self.run(&id, about.is_cluster()).await?)
            }
        };
        Ok(Event::Answered { about, run })
    }

    async fn run(&mut self, id: &Text, is_cluster: bool) -> Result<Box<Run>, Trouble> {
        let run = format!("/api/v1/runs/{}", escaped(id));
        let overview: Overview = self.link.get(&run).await?;
        let loss = self.link.get(&format!("{run}/series?figures=loss&points={POINTS}")).await?;
        let known = self.known.take().filter(|known| known.overview.id == overview.id);
        self.count += 1;
        let is_due = self.count.is_multiple_of(LARGE_EVERY)
            || known.as_ref().is_none_or(|known| known.overview.step == 0);
        let mut known = known.unwrap_or_default();
        let job = format!("/api/v1/jobs/{}", escaped(id));
        if is_cluster {
            known.job = Some(self.link.get(&job).await?);
        }
        if is_due {
            known.experts = self.optional(&format!("{run}/experts")).await?.unwrap_or_else(Experts::default);
            known.pipeline = None;
            for (view, is_there) in [("recorded", overview.has_recording), ("actions", overview.has_plan)] {
                if is_there && known.pipeline.is_none() {
                    known.pipeline = self.optional(&format!("{run}/pipeline?view={view}")).await?;
                }
            }
            if is_cluster {
                let incidents: Incidents = self.link.get(&format!("{job}/incidents")).await?;
                known.incidents = incidents.incidents;
            }
        }
        (known.overview, known.loss) = (overview, loss);
        self.known = Some(known.clone());
        Ok(known)
    }

    /// None where there is nothing of the kind.
    async fn optional<T: serde::de::DeserializeOwned>(&mut self, path: &str) -> Result<Option<T>, Trouble> {
        match self.link.get(path).await {
            Ok(answer) => Ok(Some(answer)),
            Err(Trouble::Refused { status: 404, .. }) => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }
}

/// A part of a path: all that is not plain is written as bytes.
fn escaped(part: &str) -> String {
    let mut path = String::new();
    for byte in part.bytes() {
        match byte {
            b'-' | b'_' | b'.' => path.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() => path.push(byte.into()),
            _ => path += &format!("%{byte:02X}"),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_part_of_a_path_whatever_is_in_it() {
        assert_eq!(escaped("tiny-2.x_y"), "tiny-2.x_y");
        assert_eq!(escaped("../a b?c#d%ö"), "..%2Fa%20b%3Fc%23d%25%C3%B6");
    }
}
