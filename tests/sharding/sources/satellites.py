"""Small products of Sentinel-2 and in DIMAP, laid out as the agencies deliver them, by rasterio and text alone."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import Affine

from tests.sharding.sources.sensors import EAST, NORTH, Land

IDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
PIXELS = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B05": 20, "B8A": 20, "B11": 20, "B01": 60}
UTM = CRS.from_epsg(32631)


def two(band: str) -> str:
    """Name of a band with two digits, as in the names of files."""
    return f"B0{band[1]}" if len(band) == 2 else band


def write_jp2(path: Path, image: NDArray[np.generic], transform: Affine) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = image.shape
    profile = {"count": count, "height": height, "width": width, "dtype": image.dtype.name}
    with rasterio.open(
        path, "w", "JP2OpenJPEG", crs=UTM, transform=transform, QUALITY=100, REVERSIBLE="YES", **profile
    ) as file:
        file.write(image)


def write_safe(
    folder: Path,
    day: str,
    bands: Mapping[str, NDArray[np.uint16]],
    corner: tuple[float, float],
    *,
    level: str = "2A",
    baseline: str = "04.00",
    offset: int | None = -1000,
    mask: NDArray[np.uint8] | None = None,
    extra: str = "",
    satellite: str = "S2A",
) -> Path:
    """Write a product; ``bands`` are values by the two-digit name, on grids of `PIXELS` from ``corner``."""
    stamp = f"{day.replace('-', '')}T104621"
    name = f"{satellite}_MSIL{level}_{stamp}_N{baseline.replace('.', '')}_R051_T31UDQ_{day.replace('-', '')}T150122"
    product = folder / f"{name}.SAFE"
    granule = f"GRANULE/L{level}_T31UDQ_A035994_{day.replace('-', '')}T105056"
    images = []
    for band, values in bands.items():
        size = PIXELS[band]
        place = f"R{size}m/" if level == "2A" else ""
        inner = f"{granule}/IMG_DATA/{place}T31UDQ_{stamp}_{band}" + (f"_{size}m" if level == "2A" else "")
        images.append(inner)
        write_jp2(product / f"{inner}.jp2", values[None], Affine(size, 0, corner[0], 0, -size, corner[1]))
        if level == "2A" and size == 10:  # each band is there at coarser pixels too
            inner = inner.replace("R10m", "R20m").replace("_10m", "_20m")
            images.append(inner)
            write_jp2(product / f"{inner}.jp2", values[None, ::2, ::2], Affine(20, 0, corner[0], 0, -20, corner[1]))
    if mask is not None and level == "2A":
        inner = f"{granule}/IMG_DATA/R20m/T31UDQ_{stamp}_SCL_20m"
        images.append(inner)
        write_jp2(product / f"{inner}.jp2", mask[None], Affine(20, 0, corner[0], 0, -20, corner[1]))
    elif mask is not None:
        classes = np.stack([mask == 1, mask == 2, mask == 3]).astype(np.uint8)
        place = Affine(60, 0, corner[0], 0, -60, corner[1])
        write_jp2(product / f"{granule}/QI_DATA/MSK_CLASSI_B00.jp2", classes, place)
    text = safe_metadata(product, day, stamp, level, baseline, images, offset)
    (product / f"MTD_MSIL{level}.xml").write_text(text.replace("<n1:", f"{extra}<n1:", 1))
    (product / "manifest.safe").write_text("<manifest/>")
    return product


def safe_radiometry(level: str, offset: int | None) -> str:
    """Return the elements of a product's metadata that say what a value of 0 and of 1 is."""
    offsets = "".join(f'<{{}} band_id="{number}">{offset}</{{}}>' for number in range(13)) if offset is not None else ""
    if level == "2A":
        quantity = (
            '<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>'
            '<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>'
        )
        listed = f"<BOA_ADD_OFFSET_VALUES_LIST>{offsets}</BOA_ADD_OFFSET_VALUES_LIST>"
        listed = listed.replace("{}", "BOA_ADD_OFFSET")
    else:
        quantity = '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>'
        listed = f"<Radiometric_Offset_List>{offsets}</Radiometric_Offset_List>".replace("{}", "RADIO_ADD_OFFSET")
    return quantity + (listed if offset is not None else "")


def safe_metadata(
    product: Path, day: str, stamp: str, level: str, baseline: str, images: Sequence[str], offset: int | None
) -> str:
    """Return the text of a product's main file, which lists ``images``."""
    root = f"Level-{level}_User_Product"
    return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<n1:{root} xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{level}.xsd">
  <n1:General_Info>
    <Product_Info>
      <PRODUCT_START_TIME>{day}T10:46:21.024Z</PRODUCT_START_TIME>
      <PRODUCT_URI>{product.name}</PRODUCT_URI>
      <PROCESSING_LEVEL>Level-{level}</PROCESSING_LEVEL>
      <PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>
      <Datatake datatakeIdentifier="GS2A_{stamp}_035994_N04.00">
        <DATATAKE_SENSING_START>{day}T10:46:21.024Z</DATATAKE_SENSING_START>
      </Datatake>
      <Product_Organisation><Granule_List>
        <Granule granuleIdentifier="L{level}" imageFormat="JPEG2000">
          {"".join(f"<IMAGE_FILE>{image}</IMAGE_FILE>" for image in images)}
        </Granule>
      </Granule_List></Product_Organisation>
    </Product_Info>
    <Product_Image_Characteristics>
      <Special_Values>
        <SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>0</SPECIAL_VALUE_INDEX>
      </Special_Values>
      <Special_Values>
        <SPECIAL_VALUE_TEXT>SATURATED</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>65535</SPECIAL_VALUE_INDEX>
      </Special_Values>
      {safe_radiometry(level, offset)}
    </Product_Image_Characteristics>
  </n1:General_Info>
</n1:{root}>
"""


def zip_safe(product: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Pack a product as it is delivered, and remove its folder's files."""
    target = product.with_suffix(".zip")
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(product.rglob("*")):
            archive.write(path, path.relative_to(product.parent))
    for path in sorted(product.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    product.rmdir()
    return target


def write_tiles(
    folder: Path,
    name: str,
    image: NDArray[np.uint16],
    transform: Affine | None,
    tiles: tuple[int, int],
    *,
    jp2: bool,
) -> list[str]:
    """Write an image in ``tiles`` rows and columns, and return the element of the metadata that lists each file."""
    count, height, width = image.shape
    high, wide = -(-height // tiles[0]), -(-width // tiles[1])
    files = []
    for row in range(tiles[0]):
        for column in range(tiles[1]):
            part = image[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            file = f"IMG_{name}_R{row + 1}C{column + 1}.{'JP2' if jp2 else 'TIF'}"
            own = transform @ Affine.translation(column * wide, row * high) if transform else None
            if jp2:
                assert own, "the JP2 files of the tests have a place"
                write_jp2(folder / file, part, own)
            else:
                profile = {"count": count, "height": part.shape[1], "width": part.shape[2], "dtype": "uint16"}
                georeference = {"crs": UTM, "transform": own} if own else {}
                with rasterio.open(folder / file, "w", "GTiff", **profile, **georeference) as raster:
                    raster.write(part)
            files.append(
                f'<Data_File tile_R="{row + 1}" tile_C="{column + 1}"><DATA_FILE_PATH href="{file}"/></Data_File>'
            )
    return files


def dimap_radiometry(processing: str, gains: Mapping[str, tuple[float, float]], suns: Mapping[str, float]) -> str:
    """Return the elements that give gain and bias of each band, and the irradiance of the sun in some."""
    measure = "Band_Reflectance" if processing == "REFLECTANCE" else "Band_Radiance"
    measures = "".join(
        f"<{measure}><BAND_ID>{band}</BAND_ID><MEASURE_DESC>DN to physical measure</MEASURE_DESC>"
        f"<GAIN>{gain!r}</GAIN><BIAS>{bias!r}</BIAS></{measure}>"
        for band, (gain, bias) in gains.items()
    )
    irradiances = "".join(
        f"<Band_Solar_Irradiance><BAND_ID>{band}</BAND_ID><VALUE>{value}</VALUE></Band_Solar_Irradiance>"
        for band, value in suns.items()
    )
    return measures + irradiances


def write_dimap(
    folder: Path,
    image: NDArray[np.uint16],
    transform: Affine,
    *,
    ids: Sequence[str],
    listed: bool = True,
    tiles: tuple[int, int] = (1, 1),
    processing: str = "REFLECTANCE",
    gains: Mapping[str, tuple[float, float]] | None = None,
    suns: Mapping[str, float] | None = None,
    day: str = "2022-05-12",
    elevation: float = 50.0,
    place: bool = True,
    jp2: bool = False,
    extra: str = "",
) -> Path:
    """Write a product in DIMAP version 2 of ``tiles`` rows and columns; the last ones are smaller."""
    mode = "P" if len(ids) == 1 else "MS"
    name = f"PHR1A_{mode}_{day.replace('-', '')}1045123_ORT_5678"
    folder.mkdir(parents=True, exist_ok=True)
    count, height, width = image.shape
    high, wide = -(-height // tiles[0]), -(-width // tiles[1])
    files = write_tiles(folder, name, image, transform if place else None, tiles, jp2=jp2)
    indexes = "".join(
        f"<Raster_Index><BAND_ID>{band}</BAND_ID><BAND_INDEX>{number}</BAND_INDEX></Raster_Index>"
        for number, band in enumerate(ids, start=1)
    )
    bands = dimap_radiometry(processing, gains or dict.fromkeys(ids, (10000.0, 0.0)), suns or {})
    text = f"""<?xml version="1.0" encoding="ISO-8859-1"?>
{extra}<Dimap_Document>
  <Metadata_Identification><METADATA_FORMAT version="2.12">DIMAP</METADATA_FORMAT></Metadata_Identification>
  <Dataset_Identification><DATASET_NAME>DS_{name}</DATASET_NAME></Dataset_Identification>
  <Processing_Information><Product_Settings>
    <PROCESSING_LEVEL>{"ORTHO" if place else "SENSOR"}</PROCESSING_LEVEL>
    <SPECTRAL_PROCESSING>{mode}</SPECTRAL_PROCESSING>
    <Radiometric_Settings><RADIOMETRIC_PROCESSING>{processing}</RADIOMETRIC_PROCESSING></Radiometric_Settings>
  </Product_Settings></Processing_Information>
  <Raster_Data>
    <Data_Access>
      <DATA_FILE_ORGANISATION>BAND_COMPOSITE</DATA_FILE_ORGANISATION>
      <DATA_FILE_TILES>{"true" if tiles != (1, 1) else "false"}</DATA_FILE_TILES>
      <Data_Files>{"".join(files)}</Data_Files>
    </Data_Access>
    <Raster_Dimensions>
      <NROWS>{height}</NROWS><NCOLS>{width}</NCOLS><NBANDS>{count}</NBANDS>
      <Tile_Set><NTILES>{len(files)}</NTILES><Regular_Tiling>
        <NTILES_SIZE nrows="{high}" ncols="{wide}"/>
        <NTILES_COUNT ntiles_R="{tiles[0]}" ntiles_C="{tiles[1]}"/>
        <NTILES_OVERLAP nrows="0" ncols="0"/>
      </Regular_Tiling></Tile_Set>
    </Raster_Dimensions>
    <Raster_Encoding><DATA_TYPE>INTEGER</DATA_TYPE><NBITS>16</NBITS><SIGN>UNSIGNED</SIGN></Raster_Encoding>
    <Raster_Display>
      {f"<Raster_Index_List>{indexes}</Raster_Index_List>" if listed else ""}
      <Special_Value><SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_COUNT>0</SPECIAL_VALUE_COUNT>
      </Special_Value>
      <Special_Value><SPECIAL_VALUE_TEXT>SATURATED</SPECIAL_VALUE_TEXT>
        <SPECIAL_VALUE_COUNT>4095</SPECIAL_VALUE_COUNT></Special_Value>
    </Raster_Display>
  </Raster_Data>
  <Radiometric_Data><Radiometric_Calibration><Instrument_Calibration><Band_Measurement_List>
    {bands}
  </Band_Measurement_List></Instrument_Calibration></Radiometric_Calibration></Radiometric_Data>
  <Geometric_Data><Use_Area>
    <Located_Geometric_Values><LOCATION_TYPE>Top Center</LOCATION_TYPE>
      <Solar_Incidences><SUN_ELEVATION unit="deg">10</SUN_ELEVATION></Solar_Incidences></Located_Geometric_Values>
    <Located_Geometric_Values><LOCATION_TYPE>Center</LOCATION_TYPE>
      <Solar_Incidences><SUN_AZIMUTH unit="deg">150</SUN_AZIMUTH>
      <SUN_ELEVATION unit="deg">{elevation}</SUN_ELEVATION></Solar_Incidences></Located_Geometric_Values>
  </Use_Area></Geometric_Data>
  <Dataset_Sources><Source_Identification><Strip_Source>
    <MISSION>PHR</MISSION><MISSION_INDEX>1A</MISSION_INDEX>
    <IMAGING_DATE>{day}</IMAGING_DATE><IMAGING_TIME>10:45:12.3Z</IMAGING_TIME>
  </Strip_Source></Source_Identification></Dataset_Sources>
</Dimap_Document>
"""
    path = folder / f"DIM_{name}.XML"
    path.write_text(text, encoding="latin-1")
    return path


DATES = (("2021-05-02", "02.12", None), ("2022-05-12", "04.00", -1000), ("2023-06-01", "05.09", -1000))
"""Day, processing baseline and offset of each revisit of `write_satellites`."""
CLOUDY = 1
"""Index of the revisit whose SCL has clouds: its upper left corner of 20 x 20 px of 10 m."""


def write_satellites(folder: Path, scenes: int, *, side: int = 480) -> list[NDArray[np.float32]]:
    """Write PAN and target in DIMAP of 2.5 m, and three products of Sentinel-2, the second one as a zip.

    Returns:
        Reflectance of each scene's target [4, side, side]: red, green, blue, near infrared.
    """
    images = []
    for number in range(scenes):
        west = EAST + 20_000 * number
        land = Land(number, side, 2.5, west)
        fine, coarse = Affine(2.5, 0, west, 0, -2.5, NORTH), Affine(10, 0, west, 0, -10, NORTH)
        image = land.image(fine, (side, side), 1)
        images.append(image)
        place = folder / f"site{number}"
        values = np.round(image * 10000).astype(np.uint16)
        write_dimap(place / "IMG_PHR1A_PMS_001", values, fine, ids=("B2", "B1", "B0", "B3"), tiles=(2, 2))
        pan = np.round(image.mean(0, keepdims=True) * 10000).astype(np.uint16)
        write_dimap(place / "IMG_PHR1A_P_001", pan, fine, ids=("P",), tiles=(1, 2))
        seen = land.image(coarse, (side // 4, side // 4), 4)
        for visit, (day, baseline, offset) in enumerate(DATES):
            counted = np.round(seen * 10000 - (offset or 0)).astype(np.uint16)
            bands = dict(zip(("B04", "B03", "B02", "B08"), counted, strict=True))
            classes = np.full((side // 8, side // 8), 4, np.uint8)
            if visit == CLOUDY:
                classes[:10, :10] = 9
            product = write_safe(
                place, day, bands, (west, NORTH), baseline=baseline, offset=offset, mask=classes, satellite="S2B"
            )
            if visit == CLOUDY:
                zip_safe(product)
    return images
