//! Parquet: the rows of one column of texts, each a document.
//!
//! Read a few rows of a row group at a time; other columns are not touched. Knows nothing of how documents are used.

use std::fs::File;
use std::path::Path;

use contraflow_runtime::files;
use parquet::basic::{Compression, Type};
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::fault::{DataFault, of_fields, unreadable};
use super::text::Document;

/// Rows in memory at a time.
const ROWS: usize = 256;

/// Passes the documents of a file on, one by one, and what is wrong with rows that are no UTF-8; rows without a text are none.
///
/// **Errors**: the file cannot be read or is no Parquet, has no such column of texts, or what `emit` says.
pub(super) fn each<E: From<DataFault>>(
    path: &Path,
    column: &str,
    emit: &mut dyn FnMut(Result<Document, DataFault>) -> Result<(), E>,
) -> Result<(), E> {
    let broken = |error: parquet::errors::ParquetError| DataFault::Parquet {
        path: path.into(),
        reason: error.to_string(),
    };
    let file = files::open(path).map_err(|error| unreadable(path, &error))?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let column = find_column(path, column, &reader)?;
    let mut row_number = 0;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(broken)?;
        let ColumnReader::ByteArrayColumnReader(mut column) =
            group.get_column_reader(column).map_err(broken)?
        else {
            unreachable!("the column is one of byte arrays")
        };
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        loop {
            levels.clear();
            values.clear();
            let call = files::call(path).map_err(|error| unreadable(path, &error))?;
            let (rows, ..) =
                column.read_records(ROWS, Some(&mut levels), None, &mut values).map_err(broken)?;
            drop(call);
            if rows == 0 {
                break;
            }
            for (place, value) in values.iter().enumerate() {
                let number = row_number + place;
                emit(document(path, number, value))?;
            }
            row_number += rows;
        }
    }
    Ok(())
}

fn document(path: &Path, number: usize, value: &ByteArray) -> Result<Document, DataFault> {
    let text = value.data().to_vec();
    match std::str::from_utf8(&text) {
        Ok(_) => Ok(Document { name: format!("{}:{number}", path.display()), text }),
        Err(error) => {
            let reason = format!("text {number} is not UTF-8 at byte {}", error.valid_up_to());
            Err(DataFault::Parquet { path: path.into(), reason })
        }
    }
}

/// The number of the column of this name, once it is known that it can be read.
fn find_column(path: &Path, wanted: &str, reader: &SerializedFileReader<File>) -> Result<usize, DataFault> {
    let other = |found: String| DataFault::Column { path: path.into(), column: wanted.to_owned(), found };
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
    let Some(index) = names.iter().position(|name| name == wanted) else {
        return Err(other(of_fields("columns", &names)));
    };
    let column = schema.column(index);
    if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 {
        return Err(other(format!("`{wanted}` of {}", column.physical_type())));
    }
    let codecs = reader.metadata().row_groups().iter().map(|group| group.column(index).compression());
    match codecs.into_iter().find(|codec| *codec == Compression::LZO) {
        Some(codec) => Err(DataFault::Codec { path: path.into(), codec: codec.to_string() }),
        None => Ok(index),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use parquet::basic::ZstdLevel;
    use parquet::data_type::{ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A file of one row group for each of `groups`; `None` is a null.
    pub(in crate::data) fn write(
        path: &Path,
        column: &str,
        groups: &[&[Option<&str>]],
        compression: Compression,
    ) {
        let schema = format!("message m {{ required int64 id; optional byte_array {column} (UTF8); }}");
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let ids: Vec<i64> = (0..rows.len() as i64).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let values: Vec<ByteArray> = rows.iter().flatten().map(|text| ByteArray::from(*text)).collect();
            let levels: Vec<i16> = rows.iter().map(|text| i16::from(text.is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn read(path: &Path) -> Result<Vec<String>, DataFault> {
        let mut texts = Vec::new();
        each(path, "text", &mut |document| {
            texts.push(String::from_utf8(document?.text).unwrap());
            Ok::<_, DataFault>(())
        })?;
        Ok(texts)
    }

    #[test]
    fn rows_come_in_order_over_groups_and_codecs_and_nulls_are_no_documents() {
        let folder = tempfile::tempdir().unwrap();
        let many: Vec<String> = (0..1000).map(|i| format!("row {i}")).collect();
        let many: Vec<Option<&str>> = many.iter().map(|text| Some(text.as_str())).collect();
        let codecs = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(ZstdLevel::default()),
            Compression::GZIP(Default::default()),
            Compression::BROTLI(Default::default()),
            Compression::LZ4,
            Compression::LZ4_RAW,
        ];
        for compression in codecs {
            let path = folder.path().join("a.parquet");
            write(&path, "text", &[&[Some("one"), None, Some("caf\u{e9}")], &many], compression);
            let texts = read(&path).unwrap();
            assert_eq!(texts.len(), 1002);
            assert_eq!(
                [&texts[0], &texts[1], &texts[2], &texts[1001]],
                ["one", "caf\u{e9}", "row 0", "row 999"]
            );
        }
    }

    #[test]
    fn a_file_without_the_column_is_refused_with_those_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write(&path, "content", &[&[Some("one")]], Compression::UNCOMPRESSED);
        assert_eq!(
            read(&path).unwrap_err().to_string(),
            format!(
                "{}: expected a column `text` of texts, found the columns id, content; data.field (--field) names \
                 another",
                path.display()
            )
        );
        each(&path, "content", &mut |document| {
            assert_eq!(document?.text, b"one");
            Ok::<_, DataFault>(())
        })
        .unwrap();
    }

    #[test]
    fn what_is_no_parquet_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write(&path, "text", &[&[Some("one")]], Compression::UNCOMPRESSED);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error_text = read(&path).unwrap_err().to_string();
            assert!(
                error_text.starts_with(&format!("{}: expected a Parquet file", path.display())),
                "{length}: {error_text}"
            );
        }
    }
}
